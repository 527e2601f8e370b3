// Captions: the part of the model that writes them is downloaded when the first picture is to be described.

import { addressOf, Downloads, FailedDownload, forget } from "./download.js";

const DECODER = "decoder_model_merged";

export class Captions {
  /**
   * @param engine whose towers are loaded, or will be: `towers` is the promise of that.
   * @param manifest data/manifest.json, with `captions` and their file.
   */
  constructor(engine, towers, manifest) {
    Object.assign(this, { engine, towers, settings: manifest.captions, files: manifest.files });
    this.file = manifest.files[DECODER];
    this.loading = null; // a promise, which everyone waits for who asks meanwhile
    this.isLoaded = false;
    this.reports = new Set();
  }

  /** How many bytes a visitor still has to download. */
  async missingBytes() {
    const isHere = this.isLoaded || (await globalThis.caches?.match(addressOf(this.file)));
    return isHere ? 0 : this.file.bytes;
  }

  /**
   * What the model says of a picture, and how long it took: `text`, `ids`, `milliseconds`.
   *
   * @param values its pixel values.
   * @param report is told of the download, in bytes: done, all.
   * @throws FailedDownload, after which it can be tried again.
   */
  async describe(values, report = () => {}) {
    this.reports.add(report);
    try {
      await (this.loading ??= this.#load());
    } catch (error) {
      this.loading = null;
      if (error instanceof FailedDownload) forget(error.file);
      throw error;
    } finally {
      this.reports.delete(report);
    }
    const start = performance.now();
    const said = await this.engine.describe(values);
    return { ...said, milliseconds: performance.now() - start };
  }

  async #load() {
    const downloads = new Downloads(this.files, (done, all) => this.reports.forEach((report) => report(done, all)));
    downloads.expect(DECODER);
    const [graph] = await Promise.all([downloads.bytes(DECODER), this.towers]);
    await this.engine.loadCaptions({ graph, settings: this.settings });
    this.isLoaded = true;
  }
}
