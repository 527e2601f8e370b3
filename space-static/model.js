// The two towers of the model, in the browser's worker or in Node: words and pictures to embeddings of length 1.

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

  /** A picture, (height, width, 4) bytes → its `embedding`. */
  async embed(rgba, width, height) {
    const { data } = await this.run(toPixelValues(rgba, width, height, this.settings), 1);
    return { embedding: data };
  }

  /** Pixel values (images, channels, height, width), one after the other → embeddings (images, dimension). */
  async run(values, count) {
    const shape = [count, 3, this.settings.height, this.settings.width];
    const { image_embeds } = await this.session.run({ pixel_values: new this.runtime.Tensor("float32", values, shape) });
    return image_embeds;
  }
}
