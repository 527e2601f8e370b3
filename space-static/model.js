// The model, in the browser's worker or in Node: words and pictures to embeddings of length 1, pictures to captions.
//
//   ids ──────────── TextTower ─── embedding
//   pixel values ─┬─ ImageTower ── embedding
//                 └─ ImageTower ── states ── Captioner ── one token after the other

import { toPixelValues } from "./pixels.js";
import { tokenize } from "./texts.js";

/** What runs ONNX graphs, set up so that nothing is fetched but the module beside it. */
export function prepareRuntime(runtime, wasm, threads) {
  runtime.env.wasm.wasmBinary = wasm;
  runtime.env.wasm.numThreads = threads;
  runtime.env.logLevel = "error";
  return runtime;
}

async function open(runtime, graph) {
  return runtime.InferenceSession.create(new Uint8Array(graph), {
    executionProviders: ["wasm"],
    graphOptimizationLevel: "all",
  });
}

export class TextTower {
  static async load(runtime, graph, tokenizer, settings) {
    return Object.assign(new TextTower(), { runtime, tokenizer, settings, session: await open(runtime, graph) });
  }

  /** A text → its `embedding`, the `ids` that it was read as, and whether it was `cut`. */
  async embed(text) {
    const { ids, cut } = tokenize(this.tokenizer, text, this.settings);
    const { data } = await this.run([ids]);
    return { embedding: data, ids, cut };
  }

  /** Rows of ids, all of one length → embeddings (texts, dimension), without padding. */
  async run(rows) {
    const shape = [rows.length, rows[0].length];
    const ids = BigInt64Array.from(rows.flat(), BigInt);
    const mask = new BigInt64Array(ids.length).fill(1n);
    const { text_embeds } = await this.session.run({
      input_ids: new this.runtime.Tensor("int64", ids, shape),
      attention_mask: new this.runtime.Tensor("int64", mask, shape),
    });
    return text_embeds;
  }
}

export class ImageTower {
  static async load(runtime, graph, settings) {
    return Object.assign(new ImageTower(), { runtime, settings, session: await open(runtime, graph) });
  }

  /** A picture, (height, width, 4) bytes → its `embedding`, and the `values` of its pixels. */
  async embed(rgba, width, height) {
    const values = toPixelValues(rgba, width, height, this.settings);
    const { data } = await this.run(values, 1);
    return { embedding: data, values };
  }

  /** Pixel values (images, channels, height, width), one after the other → embeddings (images, dimension). */
  async run(values, count) {
    const { image_embeds } = await this.#run(values, count, ["image_embeds"]);
    return image_embeds;
  }

  /** Pixel values of one picture → what its tokens leave for captions, `present.*` (1, heads, tokens, head_dim). */
  states(values) {
    return this.#run(values, 1, this.session.outputNames.filter((name) => name.startsWith("present.")));
  }

  #run(values, count, outputs) {
    const shape = [count, 3, this.settings.height, this.settings.width];
    return this.session.run({ pixel_values: new this.runtime.Tensor("float32", values, shape) }, outputs);
  }
}

/** Writes captions, the likeliest token each time. */
export class Captioner {
  /** @param settings `bos`, the first token; `ends`, those that end a caption; `most_tokens` that are written. */
  static async load(runtime, graph, images, tokenizer, settings) {
    const session = await open(runtime, graph);
    return Object.assign(new Captioner(), { runtime, images, tokenizer, settings, session });
  }

  /** Pixel values of one picture → `text`, and the `ids` that it was written as. */
  async describe(values) {
    const ids = await this.write(values);
    return { text: this.tokenizer.decode(ids, { skip_special_tokens: true }).trim(), ids };
  }

  /** Pixel values of one picture → ids: `[BOS]`, a caption, `[EOS]`. */
  async write(values) {
    const { bos, ends, most_tokens } = this.settings;
    const ids = [bos];
    let states = await this.images.states(values);
    const [, , imageTokens] = Object.values(states)[0].dims;
    while (ids.length <= most_tokens) {
      const { logits, ...present } = await this.session.run({
        input_ids: this.#integers([ids.at(-1)]),
        attention_mask: this.#integers(new Array(imageTokens + ids.length).fill(1)),
        ...Object.fromEntries(
          Object.entries(states).map(([name, state]) => [name.replace("present", "past_key_values"), state]),
        ),
      });
      ids.push(placeOfLargest(logits.data));
      if (ends.includes(ids.at(-1))) break;
      states = present;
    }
    return ids;
  }

  #integers(row) {
    return new this.runtime.Tensor("int64", BigInt64Array.from(row, BigInt), [1, row.length]);
  }
}

function placeOfLargest(values) {
  let place = 0;
  for (let at = 1; at < values.length; at++) if (values[at] > values[place]) place = at;
  return place;
}
