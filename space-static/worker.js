// The model, in a thread of its own so that the page stays quick. Requests are {id, task, ...}, answers {id, result}
// or {id, error}.

import * as runtime from "./vendor/ort.wasm.min.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";
import { Captioner, ImageTower, prepareRuntime, TextTower } from "./model.js";
import { Refusal } from "./texts.js";

// Browsers compile what runs often a second time, for speed. It is run that often, but no longer than this.
const WARM_RUNS = 10;
const WARM_MILLISECONDS = 3000;

let texts, images, captioner;

async function warmUp() {
  const { height, width } = images.settings;
  const end = performance.now() + WARM_MILLISECONDS;
  for (let run = 0; run < WARM_RUNS && performance.now() < end; run++) {
    await images.run(new Float32Array(3 * height * width), 1);
    await new Promise((resolve) => setTimeout(resolve)); // a visitor's request comes first
  }
}

const tasks = {
  prepare({ wasm, threads }) {
    prepareRuntime(runtime, wasm, threads);
    runtime.env.wasm.wasmPaths = { mjs: new URL("vendor/ort-wasm-simd-threaded.mjs", import.meta.url).href };
  },

  async loadTexts({ graph, tokenizer, tokenizerConfig, settings }) {
    texts = await TextTower.load(runtime, graph, new Tokenizer(tokenizer, tokenizerConfig), settings);
    await texts.run([[1, 2]]); // the first run is slow: not a visitor's
  },

  async loadImages({ graph, settings }) {
    images = await ImageTower.load(runtime, graph, settings);
    await images.run(new Float32Array(3 * settings.height * settings.width), 1);
    warmUp();
  },

  async loadCaptions({ graph, settings }) {
    captioner = await Captioner.load(runtime, graph, images, texts.tokenizer, settings);
  },

  embedText: ({ text }) => texts.embed(text),
  embedImage: ({ rgba, width, height }) => images.embed(rgba, width, height),
  describe: ({ values }) => captioner.describe(values),
};

self.onmessage = async ({ data: { id, task, ...request } }) => {
  try {
    self.postMessage({ id, result: await tasks[task](request) });
  } catch (error) {
    self.postMessage({ id, error: String(error?.message ?? error), refused: error instanceof Refusal });
  }
};
