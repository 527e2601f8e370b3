// The icons that can be searched: names, credits, pictures and embeddings.

export class Gallery {
  /**
   * @param table data/gallery.json: columns, one value for each icon.
   * @param pictures PNG files, one after the other.
   * @param embeddings float32 scales (icons,), then int8 (icons, dimension): a value times its icon's scale.
   */
  constructor(table, pictures, embeddings) {
    this.table = table;
    this.pictures = pictures;
    this.length = table.names.length;
    this.scales = new Float32Array(embeddings, 0, this.length);
    this.values = new Int8Array(embeddings, 4 * this.length);
    this.dimension = this.values.length / this.length;
    this.starts = [0];
    for (const size of table.sizes) this.starts.push(this.starts.at(-1) + size);
    this.urls = new Map();
  }

  icon(index) {
    const { table } = this;
    return {
      index,
      name: table.names[index],
      otherNames: table.other_names[index],
      style: table.styles[table.style_of[index]],
      id: table.ids[index],
      set: table.sets[table.set_of[index]],
    };
  }

  /** A PNG file. */
  blob(index) {
    const bytes = new Uint8Array(this.pictures, this.starts[index], this.table.sizes[index]);
    return new Blob([bytes], { type: "image/png" });
  }

  /** Where `<img>` finds the picture. */
  url(index) {
    if (!this.urls.has(index)) this.urls.set(index, URL.createObjectURL(this.blob(index)));
    return this.urls.get(index);
  }

  /** The embedding of an icon, Float32Array (dimension,). */
  embedding(index) {
    const row = this.values.subarray(index * this.dimension, (index + 1) * this.dimension);
    return Float32Array.from(row, (value) => value * this.scales[index]);
  }

  /**
   * All icons of a style, nearest first, with their cosines.
   *
   * @param query Float32Array (dimension,), of length 1.
   * @param style its number; null for any.
   * @param without an icon to leave out.
   */
  search(query, style = null, without = null) {
    const { values, scales, dimension } = this;
    const hits = [];
    for (let index = 0, at = 0; index < this.length; index++) {
      let product = 0;
      for (let each = 0; each < dimension; each++) product += values[at++] * query[each];
      if (index === without || (style !== null && this.table.style_of[index] !== style)) continue;
      hits.push({ index, cosine: product * scales[index] });
    }
    return hits.sort((one, other) => other.cosine - one.cosine || one.index - other.index);
  }
}

/** How an icon is to be credited. */
export function creditOf({ name, set }) {
  return `“${name}” from ${set.title} by ${set.author}, ${set.license}`;
}
