/* A person or not: the int8 network of the book, as WebAssembly, on a picture of the reader's choice.
 *
 * The first part reads pictures and runs the module; a test compares its pixels and its integers with Python's. The
 * second is what the reader sees. `personData` (person-data.js, made by the book's build) holds the module and the
 * sample pictures as text, so that nothing is requested, from a server or from a file, and nothing is sent.
 */
"use strict";

const personDemo = (() => {
  const SIDE = 32;
  const MAX_PIXELS = 40_000_000;
  const MAX_BYTES = 64_000_000;

  const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  /** The network of a module's bytes: run(rgb) gives q, the attention of the last block, and the milliseconds. */
  async function network(wasm) {
    const { instance } = await WebAssembly.instantiate(wasm, {});
    const net = instance.exports;
    const [pixels, patches] = [net.pixels(), net.num_patches()];
    const run = (rgb) => {
      new Uint8Array(net.memory.buffer, pixels, rgb.length).set(rgb);
      const from = performance.now();
      const q = net.logit();
      const ms = performance.now() - from;
      return { q, ms, attention: new Int32Array(net.memory.buffer, net.attention(), patches).slice() };
    };
    for (let i = 0; i < 3; i++) run(new Uint8Array(SIDE * SIDE * 3)); // compiled before the first time is taken
    return { run, patches, zero: net.zero_point(), scale: net.scale_numerator() / 2 ** net.scale_shift(), bytes: wasm.length };
  }

  // ---------------------------------------------------------------- from any picture to 32 × 32

  /** A square of RGBA pixels on white, shrunk or enlarged by a box filter in whole numbers, rounded half up. */
  function box(rgba, side) {
    const flat = (x, y, c) => {
      const at = 4 * (y * side + x);
      const alpha = rgba[at + 3];
      return Math.floor((rgba[at + c] * alpha + 255 * (255 - alpha) + 127) / 255);
    };
    const out = new Uint8Array(SIDE * SIDE * 3);
    if (side === SIDE) return out.map((_, i) => flat(Math.floor(i / 3) % SIDE, Math.floor(i / 3 / SIDE), i % 3));
    // An edge has 32 · side units: a pixel of the picture covers 32 of them, one of the result covers `side`.
    const parts = Array.from({ length: SIDE }, (_, o) => {
      const [from, to] = [side * o, side * (o + 1)];
      const first = Math.floor(from / SIDE);
      const weights = [];
      for (let s = first; SIDE * s < to; s++) weights.push(Math.min(to, SIDE * (s + 1)) - Math.max(from, SIDE * s));
      return { first, weights };
    });
    const rows = new Float64Array(side * SIDE * 3); // sums stay whole: far below 2 ** 53
    for (let y = 0; y < side; y++) {
      parts.forEach(({ first, weights }, o) => {
        for (let c = 0; c < 3; c++) {
          let sum = 0;
          for (let k = 0; k < weights.length; k++) sum += weights[k] * flat(first + k, y, c);
          rows[(y * SIDE + o) * 3 + c] = sum;
        }
      });
    }
    const area = side * side;
    parts.forEach(({ first, weights }, o) => {
      for (let i = 0; i < SIDE * 3; i++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) sum += weights[k] * rows[(first + k) * SIDE * 3 + i];
        out[o * SIDE * 3 + i] = Math.floor((2 * sum + area) / (2 * area));
      }
    });
    return out;
  }

  /** The middle square, 32 × 32, of what a canvas can draw: a decoded picture, or a frame of a camera. */
  function shrink(image, width, height) {
    const side = Math.min(width, height);
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side;
    const brush = canvas.getContext("2d", { willReadFrequently: true });
    brush.drawImage(image, -Math.floor((width - side) / 2), -Math.floor((height - side) / 2));
    return box(brush.getImageData(0, 0, side, side).data, side);
  }

  const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
    for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
    return n;
  });
  const crc = (bytes) => ~bytes.reduce((value, byte) => CRC[(value ^ byte) & 255] ^ (value >>> 8), -1) >>> 0;
  const SEVERAL = "it has several frames; please choose a still picture";
  const SHORT = "it is damaged or cut short";

  /** What is wrong with a file, or null. A browser shows half a picture, or the first of many, without a word. */
  function fault(bytes) {
    const text = (from, to) => String.fromCharCode(...bytes.subarray(from, to));
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
    if (!bytes.length) return "it is empty";
    if (text(1, 4) === "PNG") return faultOfPng(bytes, view, text);
    if (text(0, 4) === "GIF8") return faultOfGif(bytes);
    if (text(0, 4) === "RIFF" && text(8, 12) === "WEBP") {
      if (bytes.length < 21 || view.getUint32(4, true) + 8 > bytes.length) return SHORT;
      return text(12, 16) === "VP8X" && bytes[20] & 2 ? SEVERAL : null;
    }
    if (text(4, 12) === "ftypavis") return SEVERAL;
    if (bytes[0] === 0xff && bytes[1] === 0xd8) {
      for (let i = bytes.length - 2; i > 0; i--) {
        if (bytes[i] === 0xff && bytes[i + 1] === 0xd9) return null; // the end, behind
        if (bytes[i] === 0xff && bytes[i + 1] === 0xda) return SHORT; // the start of the last scan
      }
    }
    return null;
  }

  function faultOfPng(bytes, view, text) {
    for (let at = 8; at + 12 <= bytes.length; ) {
      const [length, kind] = [view.getUint32(at), text(at + 4, at + 8)];
      const end = at + 8 + length;
      if (end + 4 > bytes.length || crc(bytes.subarray(at + 4, end)) !== view.getUint32(end)) return SHORT;
      if (kind === "IHDR" && view.getUint32(at + 8) * view.getUint32(at + 12) > MAX_PIXELS) return tooLarge();
      if (kind === "acTL") return SEVERAL;
      if (kind === "IEND") return null;
      at = end + 4;
    }
    return SHORT;
  }

  function faultOfGif(bytes) {
    const table = (flags) => (flags & 128 ? 3 * 2 ** ((flags & 7) + 1) : 0);
    const behindBlocks = (at) => {
      while (bytes[at]) at += bytes[at] + 1;
      return at + 1;
    };
    let frames = 0;
    for (let at = 13 + table(bytes[10]); at < bytes.length; ) {
      if (bytes[at] === 0x3b) return frames > 1 ? SEVERAL : null;
      if (bytes[at] === 0x2c) {
        frames += 1;
        at = behindBlocks(at + 11 + table(bytes[at + 9]));
      } else if (bytes[at] === 0x21) at = behindBlocks(at + 2);
      else break;
    }
    return frames > 1 ? SEVERAL : SHORT;
  }

  const tooLarge = () => `it has more than ${MAX_PIXELS / 1e6} million pixels`;

  /** The 32 × 32 pixels of a file; an error says what is wrong with it. */
  async function read(file) {
    if (file.size > MAX_BYTES) throw new Error(`it has more than ${MAX_BYTES / 1e6} megabytes`);
    const wrong = fault(new Uint8Array(await file.arrayBuffer()));
    if (wrong) throw new Error(wrong);
    // Upright, which is the default; colours as they stand in the file; no needless multiplication by alpha.
    const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
    const bitmap = await createImageBitmap(file, options).catch(() => {
      throw new Error("this browser cannot read it as a picture");
    });
    if (bitmap.width * bitmap.height > MAX_PIXELS) throw new Error(tooLarge());
    try {
      return shrink(bitmap, bitmap.width, bitmap.height);
    } finally {
      bitmap.close();
    }
  }

  return { SIDE, bytesOf, network, box, shrink, fault, read };
})();

(() => {
  const { SIDE } = personDemo;
  const ZOOM = 8;
  const COLOURS = {
    black: "#000000", white: "#ffffff", grey: "#808080", brown: "#7a4a21", skin: "#e8b48a", yellow: "#ffcc22",
    orange: "#ee7711", red: "#cc2222", green: "#22883a", blue: "#2255bb", "light blue": "#aaddff", purple: "#7733aa",
  };
  const minus = (text) => String(text).replace("-", "−");
  const signed = (n) => (n > 0 ? `+${n}` : minus(n));
  const clip = (x, low, high) => Math.min(Math.max(x, low), high);
  const rgbOf = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

  /** make("p", {class: "note", onclick: …}, child, …) */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  const picture = (attributes = {}) => make("canvas", { width: SIDE, height: SIDE, ...attributes });
  function paint(canvas, rgb) {
    const brush = canvas.getContext("2d");
    const image = brush.createImageData(SIDE, SIDE);
    for (let i = 0; i < SIDE * SIDE; i++) {
      image.data.set(rgb.subarray(3 * i, 3 * i + 3), 4 * i);
      image.data[4 * i + 3] = 255;
    }
    brush.putImageData(image, 0, 0);
  }

  async function demo(figure, number) {
    const id = (name) => `person-demo-${number}-${name}`;
    const net = await personDemo.network(personDemo.bytesOf(personData.wasm));
    const samples = personData.samples.map((sample) => ({ ...sample, rgb: personDemo.bytesOf(sample.rgb) }));
    const grid = Math.sqrt(net.patches);
    const state = { rgb: samples[0].rgb.slice(), cursor: [16, 16], last: null, camera: null };

    // ---------------------------------------------------------------- what the reader sees

    const radios = samples.map((sample, i) => {
      const thumb = picture({ "aria-hidden": "true" });
      paint(thumb, sample.rgb);
      const radio = make("input", { type: "radio", name: id("sample"), value: i, onchange: () => pick(i) });
      return [radio, make("label", { class: "pn-sample", title: sample.name }, radio, thumb, make("span", {}, sample.name))];
    });
    const chooser = make("input", {
      type: "file",
      id: id("file"),
      accept: "image/*",
      onchange: () => chooser.files.length && open(chooser.files[0]),
    });
    const cameraButton = make("button", { type: "button", onclick: () => (state.camera ? stop() : start()) }, "Use the webcam");

    const input = picture({
      class: "pn-picture",
      tabindex: 0,
      role: "application",
      "aria-label": "The picture that is read, 32 by 32 pixels, to paint on",
      "aria-describedby": id("keys"),
    });
    const cursor = make("span", { class: "pn-cursor", "aria-hidden": "true" });
    const overlay = make("canvas", { class: "pn-picture", width: SIDE * ZOOM, height: SIDE * ZOOM, role: "img" });
    const colour = make(
      "select",
      { id: id("colour"), onchange: () => (swatch.style.background = COLOURS[colour.value]) },
      ...Object.keys(COLOURS).map((name) => make("option", { value: name }, name)),
    );
    const swatch = make("span", { class: "pn-swatch", "aria-hidden": "true", style: "background: #000000" });
    const brush = make("input", { id: id("brush"), type: "range", min: 1, max: 8, value: 2, oninput: () => place() });
    const fill = make("button", { type: "button", onclick: () => fillAll() }, "Fill");

    const verdict = make("p", { class: "pn-verdict", role: "status" });
    const looks = make("p", { class: "pn-looks" });
    const facts = Object.fromEntries(
      ["Answer", "Steps", "Logit", "Time", "Module"].map((name) => [name, make("dd")]),
    );
    const status = make("p", { class: "pn-status", role: "status" });
    const say = (text) => (status.textContent = text);

    const app = make(
      "div",
      { class: "pn", role: "group", "aria-label": "A person or not" },
      make("fieldset", {}, make("legend", {}, "Pick a picture"), make("div", { class: "pn-samples" }, ...radios.map(([, label]) => label))),
      make(
        "div",
        { class: "pn-row" },
        make("label", { for: id("file") }, "or choose a file"),
        chooser,
        cameraButton,
      ),
      status,
      make(
        "div",
        { class: "pn-panes" },
        make("div", {}, make("p", { class: "pn-title" }, "What it reads"), make("div", { class: "pn-stage" }, input, cursor)),
        make("div", {}, make("p", { class: "pn-title" }, "Where it looks"), make("div", { class: "pn-stage" }, overlay)),
        make(
          "div",
          { class: "pn-answer" },
          verdict,
          make("dl", {}, ...Object.entries(facts).flatMap(([name, dd]) => [make("dt", {}, name), dd])),
          looks,
        ),
      ),
      make(
        "div",
        { class: "pn-row" },
        make("label", { for: id("colour") }, "Paint in"),
        colour,
        swatch,
        make("label", { for: id("brush") }, "Brush"),
        brush,
        fill,
      ),
      make(
        "p",
        { class: "pn-note", id: id("keys") },
        "Paint on the left picture with the pointer; or go there with the tab key, move with the arrow keys and paint with the space bar.",
      ),
      make(
        "p",
        { class: "pn-note" },
        "A file may also be dropped here. Files, paintings and the webcam's pictures are read by your browser alone: " +
          "nothing leaves this machine, and nothing is kept. ",
        personData.credits,
      ),
    );

    // ---------------------------------------------------------------- run and show

    function show(rgb) {
      state.rgb = rgb;
      const { q, ms, attention } = net.run(rgb);
      paint(input, rgb);
      const steps = q - net.zero;
      const says = steps > 0 ? "A person." : "No person.";
      if (verdict.firstChild?.textContent !== says) verdict.replaceChildren(make("strong", {}, says));
      facts.Answer.textContent = `${minus(q)} (zero is ${minus(net.zero)})`;
      facts.Steps.textContent = `${signed(steps)} from zero`;
      facts.Logit.textContent = `${signed(steps)} × ${net.scale.toFixed(4)} = ${signed((steps * net.scale).toFixed(2))}`;
      facts.Time.textContent = `${ms.toFixed(1)}\u00a0ms, here`;
      facts.Module.textContent = `${net.bytes.toLocaleString("en-GB")} bytes`;
      showAttention(attention);
      app.dataset.q = q;
    }

    function showAttention(attention) {
      const [most, sum] = [Math.max(...attention), attention.reduce((a, b) => a + b, 0)];
      const cell = (SIDE * ZOOM) / grid;
      const context = overlay.getContext("2d");
      context.imageSmoothingEnabled = false;
      context.drawImage(input, 0, 0, SIDE * ZOOM, SIDE * ZOOM);
      attention.forEach((value, i) => {
        const [x, y] = [(i % grid) * cell, Math.floor(i / grid) * cell];
        // the square root, because most shares are small
        context.fillStyle = `rgb(8 16 32 / ${0.88 * (1 - Math.sqrt(value / most))})`;
        context.fillRect(x, y, cell, cell);
        context.strokeStyle = "rgb(255 255 255 / 0.25)";
        context.strokeRect(x + 0.5, y + 0.5, cell - 1, cell - 1);
      });
      const best = attention.indexOf(most);
      const [row, column] = [Math.floor(best / grid), best % grid];
      context.strokeStyle = "#000000";
      context.lineWidth = 5;
      context.strokeRect(column * cell + 1, row * cell + 1, cell - 2, cell - 2);
      context.strokeStyle = "#ffffff";
      context.lineWidth = 2;
      context.strokeRect(column * cell + 1, row * cell + 1, cell - 2, cell - 2);
      context.lineWidth = 1;
      const percent = (x) => `${(100 * x).toFixed(1)}\u00a0%`;
      looks.textContent =
        `It looks most at the patch in row ${row + 1}, column ${column + 1} (framed): ${percent(most / sum)} of the ` +
        `attention, where an even share is ${percent(1 / net.patches)}.`;
      overlay.setAttribute("aria-label", `The same picture, lit where the last block looks. ${looks.textContent}`);
    }

    // ---------------------------------------------------------------- where pictures come from

    function pick(i) {
      stop();
      chooser.value = "";
      show(samples[i].rgb.slice());
      say(`Sample: ${samples[i].name}.`);
    }

    const unpick = () => radios.forEach(([radio]) => (radio.checked = false));

    async function open(file) {
      stop();
      say(`Reading ${file.name} …`);
      try {
        const rgb = await personDemo.read(file);
        unpick();
        show(rgb);
        say(`${file.name}, its middle square in 32 × 32 pixels.`);
      } catch (problem) {
        chooser.value = "";
        say(`${file.name}: ${problem.message}. The picture stays as it was.`);
      }
    }

    app.addEventListener("dragover", (event) => {
      event.preventDefault();
      app.classList.add("pn-over");
    });
    app.addEventListener("dragleave", () => app.classList.remove("pn-over"));
    app.addEventListener("drop", (event) => {
      event.preventDefault();
      app.classList.remove("pn-over");
      if (event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
      else say("That was no file.");
    });

    // ---------------------------------------------------------------- the webcam

    async function start() {
      if (!navigator.mediaDevices?.getUserMedia) return say("This browser gives a page opened in this way no camera.");
      cameraButton.disabled = true;
      say("Asking for the camera …");
      try {
        const stream = await navigator.mediaDevices.getUserMedia({ video: { width: 320, height: 240 }, audio: false });
        const video = make("video", { muted: true, playsinline: true });
        video.srcObject = stream;
        state.camera = { stream, video };
        await video.play();
        unpick();
        chooser.value = "";
        cameraButton.textContent = "Stop the webcam";
        say("The webcam is on; its pictures stay in this page.");
        look();
      } catch (problem) {
        stop();
        const why = { NotAllowedError: "The camera was not permitted.", NotFoundError: "There is no camera." };
        say(why[problem.name] ?? `The camera cannot be used: ${problem.message}`);
      } finally {
        cameraButton.disabled = false;
      }
    }

    function look() {
      if (!state.camera) return;
      const { video } = state.camera;
      if (video.videoWidth) show(personDemo.shrink(video, video.videoWidth, video.videoHeight));
      setTimeout(look, 100);
    }

    function stop() {
      if (!state.camera) return;
      for (const track of state.camera.stream.getTracks()) track.stop();
      state.camera = null;
      cameraButton.textContent = "Use the webcam";
      say("The webcam is off.");
    }

    document.addEventListener("visibilitychange", () => document.hidden && stop());

    // ---------------------------------------------------------------- paint

    /** The corner of a brush whose middle is at x, y. */
    const corner = (at) => at - Math.floor((Number(brush.value) - 1) / 2);

    function place() {
      const [x, y] = state.cursor;
      const [left, top] = [clip(corner(x), 0, SIDE), clip(corner(y), 0, SIDE)];
      const [right, bottom] = [x, y].map((at) => clip(corner(at) + Number(brush.value), 0, SIDE));
      Object.assign(cursor.style, {
        left: `${(100 * left) / SIDE}%`,
        top: `${(100 * top) / SIDE}%`,
        width: `${(100 * (right - left)) / SIDE}%`,
        height: `${(100 * (bottom - top)) / SIDE}%`,
      });
      brush.setAttribute("aria-valuetext", `${brush.value} pixels wide`);
    }

    function dot(rgb, x, y) {
      const [size, ink] = [Number(brush.value), rgbOf(COLOURS[colour.value])];
      for (let row = corner(y); row < corner(y) + size; row++) {
        for (let column = corner(x); column < corner(x) + size; column++) {
          if (row >= 0 && row < SIDE && column >= 0 && column < SIDE) rgb.set(ink, 3 * (row * SIDE + column));
        }
      }
    }

    /** A line of dots from a to b. */
    function stroke([ax, ay], [bx, by]) {
      stop();
      unpick();
      const rgb = state.rgb.slice();
      const steps = Math.max(Math.abs(bx - ax), Math.abs(by - ay), 1);
      for (let i = 0; i <= steps; i++) dot(rgb, Math.round(ax + ((bx - ax) * i) / steps), Math.round(ay + ((by - ay) * i) / steps));
      show(rgb);
    }

    function fillAll() {
      stop();
      unpick();
      const ink = rgbOf(COLOURS[colour.value]);
      show(state.rgb.map((_, i) => ink[i % 3]));
      say(`Filled with ${colour.value}.`);
    }

    const under = (event) => {
      const { left, top, width, height } = input.getBoundingClientRect();
      return [(event.clientX - left) / width, (event.clientY - top) / height].map((part) => clip(Math.floor(part * SIDE), 0, SIDE - 1));
    };
    input.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      input.setPointerCapture(event.pointerId);
      state.last = state.cursor = under(event);
      place();
      stroke(state.last, state.last);
    });
    input.addEventListener("pointermove", (event) => {
      if (!state.last) return;
      const at = under(event);
      stroke(state.last, at);
      state.last = state.cursor = at;
      place();
    });
    for (const end of ["pointerup", "pointercancel"]) input.addEventListener(end, () => (state.last = null));
    const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    input.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const from = state.cursor;
      if (ARROWS[event.key]) {
        state.cursor = ARROWS[event.key].map((step, i) => clip(from[i] + step, 0, SIDE - 1));
        place();
        say(`Row ${state.cursor[1] + 1}, column ${state.cursor[0] + 1}.`);
        if (event.shiftKey) stroke(from, state.cursor);
      } else if (event.key === " " || event.key === "Enter") stroke(from, from);
      else return;
      event.preventDefault();
    });

    figure.prepend(app);
    figure.classList.add("pn-on");
    radios[0][0].checked = true;
    place();
    show(state.rgb);
  }

  // The still stays where something is missing.
  document.querySelectorAll("figure.person-demo").forEach((figure, i) =>
    demo(figure, i).catch((problem) => {
      const text = `The network cannot run in this browser (${problem.message}); the figure shows what it would say.`;
      figure.prepend(make("p", { class: "pn-failed", role: "status" }, text));
    }),
  );
})();
