// Files of the page with progress, checked and unpacked. What is asked for again comes from the service worker's cache.

/** A file that could not be had, in words for a visitor; `file` is what the manifest says of it. */
export class FailedDownload extends Error {
  constructor(message, file = null) {
    super(message);
    this.file = file;
  }
}

/** Where a file is fetched from: another version has another address. */
export const addressOf = (file) => `${file.path}?v=${file.sha256.slice(0, 16)}`;

/** The service worker forgets a file that turned out to be another one. */
export function forget(file) {
  if (file) navigator.serviceWorker?.controller?.postMessage({ forget: addressOf(file) });
}

export class Downloads {
  /** @param files name → {path, bytes, sha256}, as in data/manifest.json. */
  constructor(files, report = () => {}) {
    this.files = files;
    this.report = report;
    this.done = 0;
    this.all = 0;
  }

  /** The bytes that all these files have. */
  expect(...names) {
    this.all += names.reduce((sum, name) => sum + this.files[name].bytes, 0);
  }

  /**
   * The file's content, unpacked if it is gzipped.
   *
   * @throws FailedDownload where it is not there, cut off or another one.
   */
  async bytes(name) {
    const file = this.files[name];
    const packed = await this.#fetch(file);
    await check(file, packed);
    return isGzipped(packed) ? unpack(packed) : packed.buffer;
  }

  async json(name) {
    return JSON.parse(new TextDecoder().decode(await this.bytes(name)));
  }

  async #fetch(file) {
    const packed = new Uint8Array(file.bytes);
    let length = 0;
    try {
      const response = await fetch(addressOf(file));
      if (!response.ok) throw new FailedDownload(`${file.path}: the server answers ${response.status}`, file);
      const reader = response.body.getReader();
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        if (length + part.value.length > packed.length) throw new FailedDownload(`${file.path} is too long`, file);
        packed.set(part.value, length);
        length += part.value.length;
        this.done += part.value.length;
        this.report(this.done, this.all);
      }
    } catch (error) {
      if (error instanceof FailedDownload) throw error;
      throw new FailedDownload(`${file.path} could not be downloaded: ${error.message}`, file);
    }
    if (length < packed.length) {
      throw new FailedDownload(`${file.path} is cut off: ${length} of ${packed.length} bytes arrived`, file);
    }
    return packed;
  }
}

async function check(file, bytes) {
  if (!globalThis.crypto?.subtle) return; // only there on secure pages
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (found !== file.sha256) throw new FailedDownload(`${file.path} is not the file that belongs to this page`, file);
}

export function isGzipped(bytes) {
  return bytes[0] === 0x1f && bytes[1] === 0x8b;
}

export function unpack(bytes) {
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}
