"""A program as C files: where its buffers lie, and how it reads.

Book: deploy-c
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from textbook_code.deploy.c_codegen.program import Constant, Program, Step
from textbook_code.deploy.planner import Buffer, Plan, plan

KERNELS = Path(__file__).parent / "kernels"


def allocate(program: Program) -> tuple[dict[int, int], dict[int, int], Plan]:
    """Plan the arena.

    Args:
        program: its steps in order.

    Returns:
        The buffer that each buffer shares its bytes with (itself, unless it is written over another), the
        offset of each step's scratch, and the plan.

    Book: deploy-arena
    """
    steps = program.steps
    tensors = program.graph.tensors
    last = {index: t for t, step in enumerate(steps) for index in step.reads}
    output = steps[-1].writes
    last[output] = len(steps)
    host: dict[int, int] = {}
    for t, step in enumerate(steps):
        target = step.in_place
        over = target is not None and last[target] == t and target in host
        host[step.writes] = host[target] if over and target is not None else step.writes
    first: dict[int, int] = {}
    ends: dict[int, int] = {}
    for t, step in enumerate(steps):
        first.setdefault(host[step.writes], t)
        for index in (*step.reads, step.writes):
            ends[host[index]] = max(ends.get(host[index], t), last.get(index, t))
    buffers = [Buffer(i, tensors[i].size, first[i], ends[i]) for i in first]
    buffers += [Buffer(f"scratch{t}", s.scratch, t, t) for t, s in enumerate(steps) if s.scratch]
    done = plan(buffers)
    scratch = {t: done.offsets[f"scratch{t}"] for t, step in enumerate(steps) if step.scratch}
    return host, scratch, done


def numbers(values: np.ndarray) -> str:
    """The body of an array, wrapped.

    Book: deploy-c
    """
    return textwrap.fill(", ".join(map(str, values.ravel().tolist())), 110, initial_indent="    ",
                         subsequent_indent="    ")  # fmt: skip


def _define(constant: Constant) -> str:
    note = f"/* {_safe(constant.comment)} */\n" if constant.comment else ""
    if isinstance(constant.values, tuple):
        body = "\n".join(f"    {line}" for line in constant.values)
        count = f"[{constant.count}]" if constant.count else ""
        return f"{note}const {constant.ctype} {constant.name}{count} = {{\n{body}\n}};\n"
    shape = " x ".join(map(str, constant.values.shape))
    note = f"/* {_safe(constant.comment)}: {shape} */\n" if constant.comment else f"/* {shape} */\n"
    size = constant.values.size
    return f"{note}const {constant.ctype} {constant.name}[{size}] = {{\n{numbers(constant.values)}\n}};\n"


def _declare(constant: Constant) -> str:
    count = constant.count if isinstance(constant.values, tuple) else constant.values.size
    size = f"[{count}]" if count else ""
    return f"extern const {constant.ctype} {constant.name}{size};"


def _safe(text: str) -> str:
    """A comment may not end early, nor leave ASCII."""
    return text.replace("*/", "* /").replace("/*", "/ *").encode("ascii", "replace").decode()


def weights(program: Program, include: str) -> dict[str, str]:
    """weights.h and weights.c, which include the header of the kernels.

    Book: deploy-c
    """
    declared = "\n".join(map(_declare, program.constants.values()))
    header = (
        "/* The constants of the network: weights, biases, factors, and the parameters of each call. */\n"
        "#ifndef NET_WEIGHTS_H\n#define NET_WEIGHTS_H\n\n"
        f'#include "{include}"\n\n{declared}\n\n#endif\n'
    )
    defined = "\n".join(map(_define, program.constants.values()))
    return {"weights.h": header, "weights.c": f'#include "weights.h"\n\n{defined}'}


def net(
    program: Program,
    *,
    include: str,
    facts: Mapping[str, int],
    source: str,
    output_scale: float,
    output_zero: int,
) -> tuple[dict[str, str], Plan]:
    """net.h and net.c, and the plan of the arena that they contain.

    Args:
        program: what to write.
        include: the header of the kernels.
        facts: `rgb` (bytes of an image) and what else the header tells in its comment.
        source: the name of the model's file, for the comment.
        output_scale: of the logit.
        output_zero: of the logit.

    Book: deploy-c
    """
    host, scratch, arena = allocate(program)
    steps = program.steps
    rgb, flash = facts["rgb"], facts["flash"]
    trace = program.seen
    header = f"""\
/* A network that says whether there is a person in a picture. Generated from {_safe(source)}.
 *
 * {program.macs:,} multiply-accumulates; {flash:,} bytes of constants; {arena.size:,} bytes of arena,
 * and no plan could do with fewer than {arena.bound:,}. Integers only, no library, no allocation. Not
 * reentrant: the arena is one static array.
 */
#ifndef NET_H
#define NET_H

#include <stdint.h>

#define PERSON_IMAGE_BYTES {rgb} /* height x width x (red, green, blue) */
#define PERSON_ARENA_BYTES {arena.size}
#define PERSON_MACS {program.macs} /* multiply-accumulates of a call */
#define PERSON_ZERO ({output_zero}) /* the logit that is zero */
/* one step of the logit is {output_scale:.9g}: the logit is that times (person_logit(rgb) - PERSON_ZERO) */

#ifdef __cplusplus
extern "C" {{
#endif

int person(const uint8_t rgb[PERSON_IMAGE_BYTES]); /* 1 a person, 0 none */
int8_t person_logit(const uint8_t rgb[PERSON_IMAGE_BYTES]);

#ifdef NET_TRACE
/* after a call of the above: how much each patch was attended to in the last block, summed over heads and
 * queries, in 1/256 */
#define PERSON_PATCHES {trace[1] if trace else 0}
const int32_t *person_attention(void);
#endif

#ifdef NET_PROFILE
#define PERSON_STEPS {len(steps)}
extern const char *const person_kinds[PERSON_STEPS]; /* the kind of each step */
extern const int32_t person_macs[PERSON_STEPS];      /* its multiply-accumulates */
void person_step(int step);                          /* yours: called after each step */
#endif

#ifdef __cplusplus
}}
#endif

#endif
"""
    used = sorted({index for step in steps for index in (*step.reads, step.writes)} | set(host))
    tensors = program.graph.tensors
    places = []
    for index in used:
        shape = " x ".join(map(str, tensors[index].shape)) or "1"
        over = f", over T{host[index]}" if host[index] != index else ""
        offset = f"(arena.bytes + {arena.offsets[host[index]]})"
        places.append(f"#define T{index:<4}{offset:<24} /* {shape}{over} */")
    lines = []
    for t, step in enumerate(steps):
        call = _call(step, scratch.get(t))
        lines.append(f"    /* {_safe(step.comment)} */\n    {call} DONE({t});")
        if trace and trace[0] == t and "seen" not in step.call:
            rows = tensors[step.writes].size // trace[1]
            lines.append(
                f"#ifdef NET_TRACE\n    net_attended(T{step.writes}, seen, {rows}, {trace[1]});\n#endif"
            )
    kinds = textwrap.fill(
        ", ".join(f'"{step.kind}"' for step in steps), 100, initial_indent="    ", subsequent_indent="    "
    )
    macs = numbers(np.array([step.macs for step in steps]))
    kept = f"static int32_t seen[{trace[1]}];" if trace else ""
    body = "\n".join(lines)
    code = f"""\
#include "net.h"

#include "{include}"
#include "weights.h"

static union {{
    int32_t align;
    int8_t bytes[PERSON_ARENA_BYTES];
}} arena;

/* where the tensors lie, under their numbers in the model; tensors that never live together share bytes */
{chr(10).join(places)}

#ifdef NET_TRACE
{kept}
#define SEEN seen
#else
#define SEEN 0
#endif

#ifdef NET_PROFILE
const char *const person_kinds[PERSON_STEPS] = {{
{kinds}
}};
const int32_t person_macs[PERSON_STEPS] = {{
{macs}
}};
#define DONE(step) person_step(step)
#else
#define DONE(step) (void)0
#endif

int8_t person_logit(const uint8_t rgb[PERSON_IMAGE_BYTES])
{{
{body}
    return T{steps[-1].writes}[0];
}}

int person(const uint8_t rgb[PERSON_IMAGE_BYTES])
{{
    const int logit = person_logit(rgb);
    return logit > PERSON_ZERO;
}}

#ifdef NET_TRACE
const int32_t *person_attention(void)
{{
    return {"seen" if trace else "0"};
}}
#endif
"""
    return {"net.h": header, "net.c": code}, arena


def _call(step: Step, scratch: int | None) -> str:
    call = step.call
    for index in {*step.reads, step.writes}:
        call = call.replace(f"{{t{index}}}", f"T{index}")
    if scratch is not None:
        call = call.replace("{scratch}", f"arena.bytes + {scratch}")
    return call.replace("{seen}", "SEEN")
