/* The attention explorer: turns each figure.attention-explorer from a still into an instrument.
 *
 * Its parts, from above: the sentence, the choice of layer and head, all heads as small maps, the sentence
 * with one word that looks, and the map of the chosen head. Needs attention-model.js. */
"use strict";

(() => {
  const CHOICES = [
    ["the word before", (w, T) => diagonal(w, T, -1)],
    ["the word itself", (w, T) => diagonal(w, T, 0)],
    ["the word after", (w, T) => diagonal(w, T, 1)],
    ["[CLS]", (w, T) => column(w, T, 0)],
    ["[SEP]", (w, T) => column(w, T, T - 1)],
  ];

  /** Mean weight on the key `offset` places after the query. */
  function diagonal(w, T, offset) {
    let sum = 0;
    for (let i = Math.max(0, -offset); i < Math.min(T, T - offset); i++) sum += w[i * T + i + offset];
    return sum / (T - Math.abs(offset));
  }

  function column(w, T, j) {
    let sum = 0;
    for (let i = 0; i < T; i++) sum += w[i * T + j];
    return sum / T;
  }

  const shown = (weight) => (weight < 0.005 ? "less than 0.01" : weight.toFixed(2));
  const quoted = (word) => `“${word}”`;
  const megabytes = (n) => `${(n / 1e6).toFixed(n < 1e6 ? 1 : 0)} MB`;
  const range = (n) => Array.from({ length: n }, (_, i) => i);

  /** make("p", {class: "note", onclick: …}, child, …) */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  /** Where an arrow key leads in a grid, or null. */
  function step(event, row, col, rows, cols) {
    if (event.ctrlKey || event.altKey || event.metaKey) return null;
    const at = {
      ArrowUp: [row - 1, col],
      ArrowDown: [row + 1, col],
      ArrowLeft: [row, col - 1],
      ArrowRight: [row, col + 1],
      Home: [row, 0],
      End: [row, cols - 1],
    }[event.key];
    if (!at) return null;
    event.preventDefault();
    return [Math.min(Math.max(at[0], 0), rows - 1), Math.min(Math.max(at[1], 0), cols - 1)];
  }

  /** Shades from the style sheet's three stops; `shade(weight)` goes with the root, because most are small. */
  function shades(element) {
    const style = getComputedStyle(element);
    const stops = ["--ae-low", "--ae-middle", "--ae-high"].map((name) =>
      style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map((hex) => parseInt(hex, 16)),
    );
    const table = range(256).map((n) => {
      const place = (n / 255) * 2;
      const from = Math.min(Math.floor(place), 1);
      return stops[from].map((low, c) => Math.round(low + (place - from) * (stops[from + 1][c] - low)));
    });
    return (weight) => table[Math.round(Math.sqrt(Math.min(weight, 1)) * 255)];
  }

  const css = (rgb) => `rgb(${rgb.join(" ")})`;

  async function explore(figure, number) {
    const { layers, heads, maxTokens, start, examples, error } = await attentionModel.load("manifest");
    const id = (name) => `attention-explorer-${number}-${name}`;
    const state = { ...start, col: start.token, tokens: [], maps: [] };
    let shade;

    // ---------------------------------------------------------------- what stands on the page

    const option = (value, text) => make("option", { value }, text);
    const select = (name, label, options, onchange) => {
      const box = make("select", { id: id(name), onchange }, ...options);
      return [make("label", { for: id(name) }, label), box];
    };
    const [exampleLabel, exampleBox] = select(
      "example",
      "Sentence",
      [...examples.map(({ text }, i) => option(i, text)), option("", "a sentence of your own")],
      () => (exampleBox.value === "" ? field.focus() : showExample(Number(exampleBox.value))),
    );
    const field = make("input", { id: id("text"), type: "text", maxlength: 300, autocomplete: "off" });
    const button = make("button", { type: "submit" }, "Read it");
    const form = make(
      "form",
      { class: "ae-own", onsubmit: (event) => (event.preventDefault(), readOwn()) },
      make("label", { for: id("text") }, "Your own"),
      field,
      button,
    );
    const status = make("p", { class: "ae-status", role: "status" });
    const number0 = (n) => range(n).map((i) => option(i, i));
    const [layerLabel, layerBox] = select("layer", "Layer", number0(layers), () =>
      choose(Number(layerBox.value), state.head),
    );
    const [headLabel, headBox] = select("head", "Head", number0(heads), () =>
      choose(state.layer, Number(headBox.value)),
    );
    const [findLabel, findBox] = select(
      "find",
      "Find the head that looks most at",
      [option("", "…"), ...CHOICES.map(([name], i) => option(i, name))],
      () => findBox.value !== "" && find(...CHOICES[Number(findBox.value)]),
    );
    const overview = make("div", { class: "ae-all", role: "group", "aria-label": "All heads: rows are layers" });
    const strip = make("div", { class: "ae-words", role: "radiogroup", "aria-label": "The word that looks" });
    const summary = make("p", { class: "ae-summary", "aria-live": "polite" });
    const map = make("table", { class: "ae-map", role: "grid" });
    const value = make("p", { class: "ae-value", "aria-hidden": "true" });
    const legend = make(
      "div",
      { class: "ae-legend", "aria-hidden": "true" },
      make("span", { class: "ae-ramp" }),
      ...[0, 0.1, 0.25, 0.5, 1].map((w) => make("span", { style: `left: ${100 * Math.sqrt(w)}%` }, String(w))),
    );
    const note = make(
      "p",
      { class: "ae-note" },
      `The listed sentences show the weights of the model in 32 bits. Your own are computed here, by the same model ` +
        `in 8 bits; nothing you type leaves this page. On the listed sentences, 8 bits move a weight by ` +
        `${error.mean.toFixed(4)} on average and by ${error.largest.toFixed(3)} at most.`,
    );
    const app = make(
      "div",
      { class: "ae", role: "group", "aria-label": "Attention explorer" },
      make("div", { class: "ae-row" }, exampleLabel, exampleBox),
      form,
      status,
      make("div", { class: "ae-row" }, layerLabel, layerBox, headLabel, headBox, findLabel, findBox),
      strip,
      summary,
      make("div", { class: "ae-panes" }, make("div", { class: "ae-scroll" }, map, value), make("div", {}, overview, legend)),
      note,
    );

    // ---------------------------------------------------------------- drawing

    const size = () => state.tokens.length;
    const headMap = (layer = state.layer, head = state.head) => {
      const area = size() ** 2;
      return state.maps[layer].subarray(head * area, (head + 1) * area);
    };
    const weight = (row, col) => headMap()[row * size() + col];

    /** Build what depends on the number of words. */
    function build() {
      const T = size();
      state.token = Math.min(state.token, T - 1);
      state.col = Math.min(state.col, T - 1);
      strip.replaceChildren(
        ...state.tokens.map((word, i) =>
          make("button", { type: "button", role: "radio", onclick: () => look(i, state.col) }, word, make("span")),
        ),
      );
      map.style.setProperty("--ae-count", T);
      map.replaceChildren(
        make(
          "thead",
          {},
          make("tr", {}, make("td"), ...state.tokens.map((word) => make("th", { scope: "col" }, make("span", {}, word)))),
        ),
        make(
          "tbody",
          {},
          ...state.tokens.map((word, row) =>
            make(
              "tr",
              {},
              make("th", { scope: "row" }, word),
              ...range(T).map((col) =>
                make("td", {
                  tabindex: -1,
                  onclick: () => look(row, col),
                  onmouseenter: () => tell(row, col),
                  onmouseleave: () => tell(state.token, state.col),
                }),
              ),
            ),
          ),
        ),
      );
      overview.replaceChildren(
        make("span", { "aria-hidden": "true" }),
        ...range(heads).map((head) => make("span", { "aria-hidden": "true" }, head)),
        ...range(layers).flatMap((layer) => [
          make("span", { "aria-hidden": "true" }, layer),
          ...range(heads).map((head) =>
            make(
              "button",
              { type: "button", "aria-label": `Layer ${layer}, head ${head}`, onclick: () => choose(layer, head) },
              make("canvas", { width: T, height: T }),
            ),
          ),
        ]),
      );
    }

    const thumb = (layer, head) => overview.querySelectorAll("button")[layer * heads + head];
    const cell = (row, col) => map.tBodies[0].rows[row].cells[col + 1];

    function drawOverview() {
      const T = size();
      for (const layer of range(layers)) {
        for (const head of range(heads)) {
          const canvas = thumb(layer, head).firstChild.getContext("2d");
          const image = canvas.createImageData(T, T);
          headMap(layer, head).forEach((w, i) => image.data.set([...shade(w), 255], 4 * i));
          canvas.putImageData(image, 0, 0);
        }
      }
    }

    function drawHead() {
      layerBox.value = state.layer;
      headBox.value = state.head;
      map.setAttribute("aria-label", `Weights of layer ${state.layer}, head ${state.head}: rows look at columns`);
      overview.querySelectorAll("button").forEach((each, i) => {
        const chosen = i === state.layer * heads + state.head;
        each.setAttribute("aria-pressed", chosen);
        each.tabIndex = chosen ? 0 : -1;
      });
      for (const row of range(size())) {
        for (const col of range(size())) {
          const each = cell(row, col);
          each.style.backgroundColor = css(shade(weight(row, col)));
          each.setAttribute("aria-label", `${state.tokens[row]} to ${state.tokens[col]}: ${shown(weight(row, col))}`);
        }
      }
      drawRow();
    }

    function drawRow() {
      const T = size();
      Array.from(strip.children).forEach((each, i) => {
        const chosen = i === state.token;
        each.setAttribute("aria-checked", chosen);
        each.tabIndex = chosen ? 0 : -1;
        each.lastChild.style.setProperty("--ae-weight", weight(state.token, i));
      });
      for (const row of range(T)) {
        map.tBodies[0].rows[row].classList.toggle("ae-looks", row === state.token);
        for (const col of range(T)) cell(row, col).tabIndex = row === state.token && col === state.col ? 0 : -1;
      }
      const [first, second] = range(T).sort((a, b) => weight(state.token, b) - weight(state.token, a));
      const says = (col) => `${quoted(state.tokens[col])}, ${shown(weight(state.token, col))}`;
      summary.textContent =
        `Layer ${state.layer}, head ${state.head}: ${quoted(state.tokens[state.token])} looks most at ` +
        `${says(first)}` + (second === undefined ? "." : `, then at ${says(second)}.`);
      tell(state.token, state.col);
    }

    /** The value under the pointer or the focus. */
    function tell(row, col) {
      value.textContent = `${state.tokens[row]} → ${state.tokens[col]}: ${shown(weight(row, col))}`;
    }

    // ---------------------------------------------------------------- what the reader does

    function choose(layer, head, focus = false) {
      Object.assign(state, { layer, head });
      findBox.value = "";
      drawHead();
      if (focus) thumb(layer, head).focus();
    }

    function look(row, col) {
      Object.assign(state, { token: row, col });
      drawRow();
    }

    function find(name, measure) {
      const scores = range(layers * heads).map((i) => measure(headMap(Math.floor(i / heads), i % heads), size()));
      const best = scores.indexOf(Math.max(...scores));
      const chosen = findBox.value;
      choose(Math.floor(best / heads), best % heads);
      findBox.value = chosen;
      say(`Layer ${state.layer}, head ${state.head} gives ${name} ${shown(scores[best])} of its weight on average.`);
    }

    const say = (text) => (status.textContent = text);

    function show(tokens, maps) {
      Object.assign(state, { tokens, maps });
      build();
      drawOverview();
      drawHead();
      findBox.value = "";
    }

    async function showExample(i) {
      try {
        const maps = await attentionModel.example(i);
        show(examples[i].tokens, maps);
        say("");
      } catch (problem) {
        say(problem.message);
      }
    }

    async function readOwn() {
      const text = field.value.trim();
      if (!text) return say("Type a sentence first."), field.focus();
      button.disabled = true;
      try {
        say("Reading the vocabulary …");
        const ids = await attentionModel.encode(text);
        if (ids.length > maxTokens) {
          return say(`This text has ${ids.length} word pieces; there is room for ${maxTokens}. Please shorten it.`);
        }
        const size = await attentionModel.toLoad(ids);
        const from = performance.now();
        const maps = await attentionModel.attend(ids, (layer) =>
          say(`${size ? `Loading ${megabytes(size)}; l` : "L"}ayer ${layer + 1} of ${layers} …`),
        );
        const tokens = await attentionModel.decode(ids);
        exampleBox.value = "";
        show(tokens, maps);
        const unknown = tokens.includes("[UNK]") && !text.includes("[UNK]");
        say(
          `${tokens.length} word pieces read in ${((performance.now() - from) / 1000).toFixed(1)} s.` +
            (unknown ? " [UNK] stands for what the vocabulary does not have." : ""),
        );
        offer();
      } catch (problem) {
        say(`${problem.message} The listed sentences still work.`);
      } finally {
        button.disabled = false;
      }
    }

    /** Say on the button what pressing it will load. */
    async function offer() {
      const size = await attentionModel.toLoad();
      button.textContent = size ? `Read it (loads ${megabytes(size)})` : "Read it";
    }

    overview.addEventListener("keydown", (event) => {
      const to = step(event, state.layer, state.head, layers, heads);
      if (to) choose(...to, true);
    });
    map.addEventListener("keydown", (event) => {
      const to = step(event, state.token, state.col, size(), size());
      if (!to) return;
      look(...to);
      cell(...to).focus();
    });
    strip.addEventListener("keydown", (event) => {
      const to = step(event, 0, state.token, 1, size());
      if (!to) return;
      look(to[1], state.col);
      strip.children[to[1]].focus();
    });

    // ---------------------------------------------------------------- start

    function repaint() {
      shade = shades(app);
      if (!size()) return;
      drawOverview();
      drawHead();
    }

    const maps = await attentionModel.example(0);
    figure.prepend(app);
    figure.classList.add("ae-on");
    repaint();
    show(examples[0].tokens, maps);
    offer();
    new MutationObserver(repaint).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  }

  // The still stays where something is missing.
  document
    .querySelectorAll("figure.attention-explorer")
    .forEach((figure, i) => explore(figure, i).catch((problem) => console.error(problem)));
})();
