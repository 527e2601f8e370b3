// The page's end of the worker: `engine.embedText(...)` and its like, as promises.

import { Refusal } from "./texts.js";

const MOST_THREADS = 4; // more bring nothing to a model of this size

/**
 * How many threads run the model: one core stays free. Threads wait for each other by turning in circles, and where one
 * of them has to share its core, with the page itself or with other programs, two take twice as long as one.
 */
export function threadsFor(cores) {
  return Math.max(1, Math.min(MOST_THREADS, cores - 1));
}

export class Engine {
  constructor() {
    this.waiting = new Map();
    this.count = 0;
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => this.#settle(data);
    this.worker.onerror = (event) => {
      event.preventDefault();
      const error = new Error(event.message || "a module of it can't be loaded");
      for (const { reject } of this.waiting.values()) reject(error);
      this.waiting.clear();
    };
  }

  prepare(wasm) {
    // Threads share memory, which browsers allow only to pages that are isolated from other sites.
    const threads = globalThis.crossOriginIsolated ? threadsFor(navigator.hardwareConcurrency || 1) : 1;
    return this.#ask("prepare", { wasm, threads }, [wasm]);
  }

  loadTexts(parts) {
    return this.#ask("loadTexts", parts, [parts.graph]);
  }

  loadImages(parts) {
    return this.#ask("loadImages", parts, [parts.graph]);
  }

  /** A text → `embedding`, `ids`, `cut`. */
  embedText(text) {
    return this.#ask("embedText", { text });
  }

  /** An ImageData, whose memory moves to the worker → `embedding`, and the `values` of its pixels. */
  embedImage({ data, width, height }) {
    return this.#ask("embedImage", { rgba: data, width, height }, [data.buffer]);
  }

  loadCaptions(parts) {
    return this.#ask("loadCaptions", parts, [parts.graph]);
  }

  /** Pixel values → `text`, and the `ids` that it was written as. */
  describe(values) {
    return this.#ask("describe", { values });
  }

  stop() {
    this.worker.terminate();
  }

  #ask(task, request, moved = []) {
    const id = ++this.count;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, task, ...request }, moved);
    });
  }

  #settle({ id, result, error, refused }) {
    const { resolve, reject } = this.waiting.get(id) ?? {};
    this.waiting.delete(id);
    if (error === undefined) resolve?.(result);
    else reject?.(refused ? new Refusal(error) : new Error(error));
  }
}
