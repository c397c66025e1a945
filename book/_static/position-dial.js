/* The dial of the page on positions: RoPE's frequencies and ALiBi's slopes, turned by hand.
 *
 * The first part computes what textbook_code.layers.positions computes, and is compared with it by a test; the
 * second draws. No request is made.
 */
"use strict";

const positionDial = (() => {
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const clip = (x, low, high) => Math.min(Math.max(x, low), high);

  /** ω of each plane, radians a position, fastest first. */
  const plain = (headDim, theta) => range(headDim / 2).map((i) => theta ** ((-2 * i) / headDim));

  const scalings = {
    none: (omega) => omega,
    linear: (omega, s) => omega.map((w) => w / s),
    NTK: (omega, s) => omega.map((w, i) => w * s ** (-i / Math.max(omega.length - 1, 1))),
    "LLaMA 3": (omega, s, original, low = 1, high = 4) =>
      omega.map((w) => {
        const share = clip(((original * w) / (2 * Math.PI) - low) / (high - low), 0, 1);
        return ((1 - share) * w) / s + share * w;
      }),
    YaRN: (omega, s, original, fast = 32, slow = 1) => {
      const planes = omega.length;
      const [first, last] = [Math.log(omega[0]), Math.log(omega[planes - 1])];
      const plane = (turns) => ((first - Math.log((2 * Math.PI * turns) / original)) / (first - last)) * (planes - 1);
      const a = Math.max(Math.floor(plane(fast)), 0);
      const b = Math.min(Math.ceil(plane(slow)), 2 * planes - 1);
      return omega.map((w, i) => {
        const share = clip((i - a) / (b > a ? b - a : 1e-3), 0, 1);
        return (1 - share) * w + (share * w) / s;
      });
    },
  };

  function frequencies({ headDim, theta, scaling, factor, original }) {
    return scalings[scaling](plain(headDim, theta), factor, original);
  }

  /** The factor on cosines and sines; a score has its square. */
  const gain = ({ scaling, factor }) => (scaling === "YaRN" ? 0.1 * Math.log(factor) + 1 : 1);

  /** The score of a vector with itself at a distance, over its score at distance 0 unscaled. */
  function score(settings, distance) {
    const omega = frequencies(settings);
    return (gain(settings) ** 2 * omega.reduce((sum, w) => sum + Math.cos(w * distance), 0)) / omega.length;
  }

  function slopes(heads) {
    const n = 2 ** Math.floor(Math.log2(heads));
    const exponents = range(n).map((h) => (8 * (h + 1)) / n);
    for (let h = 1; h < 2 * n; h += 2) exponents.push((4 * h) / n);
    return exponents.slice(0, heads).map((e) => 2 ** -e);
  }

  return { frequencies, gain, score, slopes, scalings: Object.keys(scalings) };
})();

(() => {
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const shown = (x) => (x === 0 ? "0" : Math.abs(x) < 0.001 ? x.toExponential(1) : x.toPrecision(3));
  const counted = (n) => Math.round(n).toLocaleString("en-GB");
  const FARTHEST = 16; // times the original context
  const SVG = "http://www.w3.org/2000/svg";

  /** make("p", {class: "note", oninput: …}, child, …), or draw("line", …) for parts of a drawing */
  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }
  const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS(SVG, tag), attributes, children);

  const path = (points) => "M" + points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");

  /** Axes from (x0, y0) to (x1, y1) of a drawing with ticks; returns the two scales. */
  function axes(svg, { box: [left, top, right, bottom], x, y, xLabel, yLabel }) {
    const at = ([low, high, log], from, to) => (v) => {
      const part = log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low);
      return from + part * (to - from);
    };
    const [px, py] = [at(x.of, left, right), at(y.of, bottom, top)];
    for (const [v, text] of x.ticks) {
      svg.append(draw("line", { class: "pd-grid", x1: px(v), x2: px(v), y1: top, y2: bottom }));
      svg.append(draw("text", { x: px(v), y: bottom + 16, "text-anchor": "middle" }, text));
    }
    for (const [v, text] of y.ticks) {
      svg.append(draw("line", { class: "pd-grid", x1: left, x2: right, y1: py(v), y2: py(v) }));
      svg.append(draw("text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, text));
    }
    svg.append(draw("text", { x: (left + right) / 2, y: bottom + 34, "text-anchor": "middle" }, xLabel));
    svg.append(draw("text", { x: left - 40, y: top - 8 }, yLabel));
    return [px, py];
  }

  function dial(box, number) {
    const id = (name) => `position-dial-${number}-${name}`;
    const labelled = (name, text, control) => [make("label", { for: id(name) }, text), control];
    const select = (name, text, values, chosen, onchange) => {
      const options = values.map((v) => make("option", { value: v }, typeof v === "number" ? counted(v) : v));
      const control = make("select", { id: id(name), onchange }, ...options);
      control.value = chosen;
      return [control, labelled(name, text, control)];
    };
    const slider = (name, text, low, high, step, value, oninput) => {
      const control = make("input", { id: id(name), type: "range", min: low, max: high, step, value, oninput });
      return [control, labelled(name, text, control)];
    };

    // ---------------------------------------------------------------- RoPE

    const [headDim, headDimRow] = select("width", "Head width", [8, 16, 32, 64, 128], 64, () => turn());
    const [theta, thetaRow] = select("theta", "θ", [500, 10000, 100000, 500000], 10000, () => turn());
    const [original, originalRow] = select("context", "Context trained on", [512, 2048, 8192], 2048, () => turn());
    const [scaling, scalingRow] = select("scaling", "Scaling", positionDial.scalings, "none", () => turn());
    const [factor, factorRow] = slider("factor", "by", 1, 16, 0.5, 8, () => turn());
    const [place, placeRow] = slider("distance", "Distance", 0, 400, 1, 120, () => turn());
    const clocks = draw("svg", { class: "pd-clocks", role: "img" });
    const curve = draw("svg", { class: "pd-curve", role: "img", viewBox: "0 0 560 240" });
    const says = make("p", { class: "pd-says", "aria-live": "polite" });

    const settings = () => ({
      headDim: Number(headDim.value),
      theta: Number(theta.value),
      original: Number(original.value),
      scaling: scaling.value,
      factor: Number(factor.value),
    });

    function turn() {
      const now = settings();
      const farthest = FARTHEST * now.original;
      const distance = Math.round(farthest ** (place.value / 400)) - (place.value === "0" ? 1 : 0);
      const omega = positionDial.frequencies(now);
      factor.disabled = now.scaling === "none";
      factor.setAttribute("aria-valuetext", `${now.factor} times`);
      place.setAttribute("aria-valuetext", `${counted(distance)} tokens`);

      const step = Math.max(1, omega.length / 16); // sixteen clocks at most
      const planes = range(Math.min(16, omega.length)).map((i) => Math.floor(i * step));
      clocks.setAttribute("viewBox", `0 0 560 ${planes.length > 8 ? 150 : 80}`);
      clocks.replaceChildren();
      planes.forEach((plane, i) => {
        const [cx, cy] = [35 + 70 * (i % 8), 32 + 72 * Math.floor(i / 8)];
        const angle = omega[plane] * distance;
        const slowed = omega[plane] < 0.999 * positionDial.frequencies({ ...now, scaling: "none" })[plane];
        clocks.append(
          draw("circle", { cx, cy, r: 25, class: slowed ? "pd-face pd-slowed" : "pd-face" }),
          draw("line", {
            class: "pd-hand",
            x1: cx,
            y1: cy,
            x2: (cx + 22 * Math.cos(angle)).toFixed(2),
            y2: (cy - 22 * Math.sin(angle)).toFixed(2),
          }),
          draw("text", { x: cx, y: cy + 38, "text-anchor": "middle" }, String(plane)),
        );
      });
      const turned = omega.filter((w) => w * distance >= 2 * Math.PI).length;
      clocks.setAttribute(
        "aria-label",
        `Clock hands of planes ${planes[0]} to ${planes.at(-1)}: ${turned} of ${omega.length} have come round.`,
      );

      curve.replaceChildren();
      const ticks = [1, 10, 100, 1000, 10000, 100000].filter((v) => v <= farthest);
      const [x, y] = axes(curve, {
        box: [48, 26, 545, 190],
        x: { of: [1, farthest, true], ticks: ticks.map((v) => [v, counted(v)]) },
        y: { of: [-0.5, 1.8], ticks: [-0.5, 0, 0.5, 1, 1.5].map((v) => [v, String(v)]) },
        xLabel: "distance in tokens",
        yLabel: "score of a vector with itself",
      });
      const distances = range(401).map((i) => farthest ** (i / 400));
      const line = (kind) =>
        path(distances.map((d) => [x(d), y(positionDial.score({ ...now, scaling: kind }, d))]));
      curve.append(
        draw("line", { class: "pd-context", x1: x(now.original), x2: x(now.original), y1: 26, y2: 190 }),
        draw("path", { class: "pd-plain", d: line("none") }),
      );
      if (now.scaling !== "none") curve.append(draw("path", { class: "pd-line", d: line(now.scaling) }));
      const score = positionDial.score(now, distance);
      curve.append(draw("circle", { class: "pd-dot", cx: x(Math.max(distance, 1)), cy: y(score), r: 5 }));
      const longest = (2 * Math.PI) / omega.at(-1);
      says.textContent =
        `At a distance of ${counted(distance)} tokens the score is ${shown(score)}; ${turned} of ` +
        `${omega.length} hands have come round. The slowest takes ${counted(longest)} tokens a turn.`;
      curve.setAttribute(
        "aria-label",
        `Score of a vector with itself, from 1 to ${counted(farthest)} tokens, ` +
          (now.scaling === "none" ? "not scaled." : `not scaled and scaled by ${now.scaling}.`),
      );
    }

    // ---------------------------------------------------------------- ALiBi

    const [heads, headsRow] = slider("heads", "Heads", 1, 40, 1, 8, () => lean());
    const fan = draw("svg", { class: "pd-curve", role: "img", viewBox: "0 0 560 240" });
    const tells = make("p", { class: "pd-says", "aria-live": "polite" });

    function lean() {
      const slopes = positionDial.slopes(Number(heads.value));
      const power = 2 ** Math.floor(Math.log2(slopes.length));
      heads.setAttribute("aria-valuetext", `${slopes.length} heads`);
      fan.replaceChildren();
      const [x, y] = axes(fan, {
        box: [48, 26, 545, 190],
        x: { of: [0, 128], ticks: [0, 32, 64, 96, 128].map((v) => [v, String(v)]) },
        y: { of: [-16, 0], ticks: [-16, -12, -8, -4, 0].map((v) => [v, String(v).replace("-", "−")]) },
        xLabel: "distance in tokens",
        yLabel: "what is added to the score",
      });
      slopes.forEach((m, h) => {
        const end = Math.min(128, 16 / m);
        const look = h < power ? "pd-slope" : "pd-slope pd-between";
        fan.append(draw("path", { class: look, d: path([[x(0), y(0)], [x(end), y(-m * end)]]) }));
      });
      const steep = Math.max(...slopes);
      const flat = Math.min(...slopes);
      tells.textContent =
        `${slopes.length} ${slopes.length === 1 ? "head" : "heads"}: slopes from ${shown(steep)} to ${shown(flat)}. ` +
        `A key loses half of its weight every ${shown(Math.LN2 / steep)} tokens in the steepest head, every ` +
        `${shown(Math.LN2 / flat)} in the flattest.` +
        (slopes.length > power
          ? ` ${slopes.length - power} of them, dashed, are taken from the row for ${2 * power} heads.`
          : "");
      fan.setAttribute("aria-label", `${slopes.length} straight lines that fall from 0 with the distance.`);
    }

    box.append(
      make(
        "div",
        { class: "pd", role: "group", "aria-label": "Dial of positions" },
        make("p", { class: "pd-title" }, "RoPE: clock hands"),
        make("div", { class: "pd-row" }, ...headDimRow, ...thetaRow, ...originalRow),
        make("div", { class: "pd-row" }, ...scalingRow, ...factorRow),
        make("div", { class: "pd-row" }, ...placeRow),
        clocks,
        curve,
        says,
        make("p", { class: "pd-title" }, "ALiBi: slopes"),
        make("div", { class: "pd-row" }, ...headsRow),
        fan,
        tells,
      ),
    );
    turn();
    lean();
  }

  document.querySelectorAll("div.position-dial").forEach(dial);
})();
