/* MiniLM's attention in the browser: WordPiece, then the encoder, from the scripts in explorer/.
 *
 * The weights have 8 bits, 64 to a scale; every sum is taken in double precision. A page opened as a file
 * may not fetch(), so each data file is a script that hands its content to receive(). */
"use strict";

window.attentionModel = (() => {
  const { src, dataset } = document.currentScript;
  const folder = new URL("explorer/", src);
  const waiting = new Map(); // name → what load() promised
  const unpacked = new Map(); // name → tensors

  // ---------------------------------------------------------------- files

  function load(name) {
    if (!waiting.has(name)) {
      const entry = {};
      entry.promise = new Promise((resolve, reject) => {
        entry.resolve = resolve;
        const script = document.createElement("script");
        script.src = new URL(`${name}.js?v=${dataset.version || ""}`, folder).href;
        script.onload = () => script.remove();
        script.onerror = () => {
          script.remove();
          waiting.delete(name); // so that a later call tries again
          reject(new Error(`The file ${name}.js could not be read.`));
        };
        document.head.append(script);
      });
      waiting.set(name, entry);
    }
    return waiting.get(name).promise;
  }

  function receive(name, payload) {
    waiting.get(name)?.resolve(payload);
  }

  function bytes(text) {
    const raw = atob(text);
    const out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out.buffer;
  }

  const floats = (text) => new Float32Array(bytes(text));
  const norm = ({ weight, bias }) => ({ weight: floats(weight), bias: floats(bias) });
  const matrix = ({ rows, cols, scale, values, bias }) => ({
    rows,
    cols,
    scale: floats(scale),
    values: new Int8Array(bytes(values)),
    bias: bias && floats(bias),
  });

  async function tensors(name, unpack) {
    if (!unpacked.has(name)) unpacked.set(name, unpack(await load(name)));
    return unpacked.get(name);
  }

  const unpackers = {
    embed: ({ places, norm: after }) => ({ places: floats(places), norm: norm(after) }),
    look: ({ q, k }) => ({ q: matrix(q), k: matrix(k) }),
    pass: (layer) => ({
      v: matrix(layer.v),
      out: matrix(layer.out),
      attnNorm: norm(layer.attn_norm),
      fc1: matrix(layer.fc1),
      fc2: matrix(layer.fc2),
      ffnNorm: norm(layer.ffn_norm),
    }),
    vocab: (text) => {
      const pieces = text.split("\n");
      return { pieces, ids: new Map(pieces.map((piece, id) => [piece, id])) };
    },
  };

  /** The weights of example number i, as read by the model in 32 bits: one array (H, T, T) for each layer. */
  async function example(i) {
    const { layers } = await load("manifest");
    const all = new Uint16Array(bytes(await load(`example-${i}`)));
    const size = all.length / layers;
    return Array.from({ length: layers }, (_, at) =>
      Float32Array.from(all.subarray(at * size, (at + 1) * size), (value) => value / 65535),
    );
  }

  // ---------------------------------------------------------------- WordPiece

  const SPECIAL = /(\[(?:PAD|UNK|CLS|SEP|MASK)\])/;
  const DROPPED = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\uFFFD]/u;
  const SPACE = /\p{White_Space}/u;
  const PUNCTUATION = /[!-/:-@[-`{-~\p{P}]/u;
  const MARK = /\p{Mn}/gu;
  const IDEOGRAPHS = [
    [0x4e00, 0x9fff],
    [0x3400, 0x4dbf],
    [0x20000, 0x2a6df],
    [0x2a700, 0x2b73f],
    [0x2b740, 0x2b81f],
    [0x2b920, 0x2ceaf],
    [0xf900, 0xfaff],
    [0x2f800, 0x2fa1f],
  ];
  const LONGEST = 100; // a longer word is unknown

  /** Lower case, no accents; words apart from punctuation and from one another. */
  function words(text) {
    let clean = "";
    for (const char of text) {
      const code = char.codePointAt(0);
      if (!"\t\n\r".includes(char) && DROPPED.test(char)) continue;
      if (SPACE.test(char)) clean += " ";
      else if (IDEOGRAPHS.some(([first, last]) => code >= first && code <= last)) clean += ` ${char} `;
      else clean += char;
    }
    const plain = Array.from(clean.normalize("NFD").replace(MARK, ""), (char) => char.toLowerCase()).join("");
    return plain.split(/\p{White_Space}+/u).flatMap((chunk) => {
      const parts = [];
      let open = false;
      for (const char of chunk) {
        if (PUNCTUATION.test(char)) parts.push(char);
        else if (open) parts[parts.length - 1] += char;
        else parts.push(char);
        open = !PUNCTUATION.test(char);
      }
      return parts;
    });
  }

  /** The longest known piece from the left, again and again; a word that does not come out even is unknown. */
  function pieces(word, ids) {
    const chars = Array.from(word);
    const unknown = [ids.get("[UNK]")];
    if (chars.length > LONGEST) return unknown;
    const out = [];
    for (let start = 0, end; start < chars.length; start = end) {
      const head = start ? "##" : "";
      end = chars.length;
      while (end > start && !ids.has(head + chars.slice(start, end).join(""))) end--;
      if (end === start) return unknown;
      out.push(ids.get(head + chars.slice(start, end).join("")));
    }
    return out;
  }

  /** A text as ids, from [CLS] to [SEP]. */
  async function encode(text) {
    const { ids } = await tensors("vocab", unpackers.vocab);
    const inner = text
      .split(SPECIAL)
      .flatMap((part, i) => (i % 2 ? [ids.get(part)] : words(part).flatMap((word) => pieces(word, ids))));
    return [ids.get("[CLS]"), ...inner, ids.get("[SEP]")];
  }

  async function decode(tokens) {
    const vocab = await tensors("vocab", unpackers.vocab);
    return tokens.map((id) => vocab.pieces[id]);
  }

  // ---------------------------------------------------------------- the encoder; x is (T, width), by rows

  /** Row number o of a matrix, back from 8 bits, into `row`. */
  function restore(m, o, group, row) {
    const groups = m.cols / group;
    for (let g = 0, i = 0; g < groups; g++) {
      const scale = m.scale[o * groups + g];
      for (const end = i + group; i < end; i++) row[i] = scale * m.values[o * m.cols + i];
    }
  }

  /** x Wᵀ + b; four rows of x at a time, so that a weight is read once for four products. */
  function linear(x, T, m, group) {
    const { rows, cols, bias } = m;
    const y = new Float32Array(T * rows);
    const row = new Float64Array(cols);
    for (let o = 0; o < rows; o++) {
      restore(m, o, group, row);
      let t = 0;
      for (; t + 3 < T; t += 4) {
        const p = t * cols;
        let a = bias[o], b = a, c = a, d = a;
        for (let i = 0; i < cols; i++) {
          const w = row[i];
          a += w * x[p + i];
          b += w * x[p + cols + i];
          c += w * x[p + 2 * cols + i];
          d += w * x[p + 3 * cols + i];
        }
        y[t * rows + o] = a;
        y[(t + 1) * rows + o] = b;
        y[(t + 2) * rows + o] = c;
        y[(t + 3) * rows + o] = d;
      }
      for (; t < T; t++) {
        let a = bias[o];
        for (let i = 0; i < cols; i++) a += row[i] * x[t * cols + i];
        y[t * rows + o] = a;
      }
    }
    return y;
  }

  /** LayerNorm of x + y. */
  function addAndNormalise(x, y, T, { weight, bias }, eps) {
    const width = weight.length;
    const out = new Float32Array(x.length);
    for (let p = 0; p < T * width; p += width) {
      let mean = 0;
      for (let i = 0; i < width; i++) mean += x[p + i] + y[p + i];
      mean /= width;
      let variance = 0;
      for (let i = 0; i < width; i++) variance += (x[p + i] + y[p + i] - mean) ** 2;
      const scale = 1 / Math.sqrt(variance / width + eps);
      for (let i = 0; i < width; i++) out[p + i] = (x[p + i] + y[p + i] - mean) * scale * weight[i] + bias[i];
    }
    return out;
  }

  /** The error function, to 1.5e-7 (Abramowitz and Stegun, 7.1.26). */
  function erf(x) {
    const t = 1 / (1 + 0.3275911 * Math.abs(x));
    const sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    return Math.sign(x) * (1 - sum * Math.exp(-x * x));
  }

  const gelu = (x) => (x / 2) * (1 + erf(x * Math.SQRT1_2));

  /** softmax(q kᵀ / √width of a head), (H, T, T). */
  function look(q, k, T, heads, width) {
    const headWidth = width / heads;
    const weights = new Float32Array(heads * T * T);
    for (let h = 0; h < heads; h++) {
      for (let i = 0; i < T; i++) {
        const row = weights.subarray((h * T + i) * T, (h * T + i + 1) * T);
        for (let j = 0; j < T; j++) {
          let score = 0;
          for (let c = h * headWidth; c < (h + 1) * headWidth; c++) score += q[i * width + c] * k[j * width + c];
          row[j] = score / Math.sqrt(headWidth);
        }
        const top = row.reduce((a, b) => Math.max(a, b));
        let sum = 0;
        for (let j = 0; j < T; j++) sum += row[j] = Math.exp(row[j] - top);
        for (let j = 0; j < T; j++) row[j] /= sum;
      }
    }
    return weights;
  }

  /** The heads' weighted sums of v, side by side. */
  function mix(weights, v, T, heads, width) {
    const headWidth = width / heads;
    const out = new Float32Array(T * width);
    for (let i = 0; i < T; i++) {
      for (let c = 0; c < width; c++) {
        const from = (Math.floor(c / headWidth) * T + i) * T;
        let sum = 0;
        for (let j = 0; j < T; j++) sum += weights[from + j] * v[j * width + c];
        out[i * width + c] = sum;
      }
    }
    return out;
  }

  const pause = () => new Promise((resolve) => setTimeout(resolve)); // lets the page draw

  /** The files that a sentence needs, in the order in which they are used. */
  function files(tokens, { layers, rows }) {
    const names = [...new Set(tokens.map((id) => `pieces-${Math.floor(id / rows)}`)), "embed"];
    for (let at = 0; at < layers; at++) names.push(`layer-${at}-look`, ...(at + 1 < layers ? [`layer-${at}-pass`] : []));
    return names;
  }

  /** Attention to tokens: one array (H, T, T) for each layer. `onLayer(n)` hears of each layer before it starts. */
  async function attend(tokens, onLayer = () => {}) {
    const sizes = await load("manifest");
    const { layers, heads, width, rows, group, eps } = sizes;
    const T = tokens.length;
    if (T > sizes.maxTokens) throw new RangeError(`tokens: expected at most ${sizes.maxTokens}, got ${T}`);
    files(tokens, sizes).forEach((name) => load(name).catch(() => {})); // all at once; await below reports
    const embed = await tensors("embed", unpackers.embed);
    let x = new Float32Array(T * width);
    const row = new Float64Array(width);
    for (let t = 0; t < T; t++) {
      const table = await tensors(`pieces-${Math.floor(tokens[t] / rows)}`, matrix);
      restore(table, tokens[t] % rows, group, row);
      x.set(row, t * width);
    }
    x = addAndNormalise(x, embed.places, T, embed.norm, eps);
    const maps = [];
    for (let at = 0; at < layers; at++) {
      onLayer(at);
      const { q, k } = await tensors(`layer-${at}-look`, unpackers.look);
      await pause();
      const weights = look(linear(x, T, q, group), linear(x, T, k, group), T, heads, width);
      maps.push(weights);
      if (at + 1 === layers) break;
      const block = await tensors(`layer-${at}-pass`, unpackers.pass);
      const mixed = mix(weights, linear(x, T, block.v, group), T, heads, width);
      x = addAndNormalise(x, linear(mixed, T, block.out, group), T, block.attnNorm, eps);
      await pause();
      const inner = linear(x, T, block.fc1, group).map(gelu);
      await pause();
      x = addAndNormalise(x, linear(inner, T, block.fc2, group), T, block.ffnNorm, eps);
    }
    return maps;
  }

  /** Bytes still to be read before a sentence can be: `tokens` left out means the parts that all need. */
  async function toLoad(tokens) {
    const sizes = await load("manifest");
    const names = tokens ? files(tokens, sizes) : ["vocab", ...files([], sizes)];
    return names.filter((name) => !waiting.has(name)).reduce((sum, name) => sum + sizes.bytes[name], 0);
  }

  return { load, receive, example, encode, decode, attend, toLoad };
})();
