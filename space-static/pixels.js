// Pictures to pixel values, as the model's Python processor makes them, to the last bit of its resize.
//
//   RGBA ── overBackground ── RGB ── trimMargins ── resize ── toPixelValues ── float32 (channels, height, width)
//
// The steps and their constants are those of `pictures_mome.py`; the resize is Pillow's for 8-bit pictures: a cubic
// filter (Keys 1981, a = -0.5) that grows with the scale, first along rows, then along columns, rounded after each.

const LEAST_CONTRAST = 3; // of graphics with their background: WCAG 2.2, success criterion 1.4.11
const INK_SIDE = 256; // pixels at which ink is looked at
const SAME_COLOUR = 16; // two 8-bit values that differ by no more are the same margin
const FILLED = 0.55; // a picture fills its canvas if it takes this share of its side
const FILLED_SMALL = 0.4; // the same on a canvas that is not scaled down
const FILTER_SUPPORT = 2; // of the cubic filter
const FIXED_POINT_BITS = 22;
const FIXED_POINT = 2 ** FIXED_POINT_BITS; // Pillow's coefficients are integers, in parts of this

/** A picture without transparency: `data` holds (height, width, step) bytes, the first three of a pixel its colour. */
export class Picture {
  constructor(width, height, step = 3, data = new Uint8ClampedArray(step * width * height)) {
    Object.assign(this, { width, height, step, data });
  }
}

// ------------------------------------------------------------------------------------------------- transparency

/** (height, width, 4) bytes, colours not multiplied by opacity → a `Picture` on the background that its ink needs. */
export function overBackground(rgba, width, height) {
  let opaque = true;
  for (let at = 3; at < rgba.length && opaque; at += 4) opaque = rgba[at] === 255;
  if (opaque) return new Picture(width, height, 4, rgba); // without a copy: of a photo it takes longer than the model
  const picture = new Picture(width, height);
  const { data } = picture;
  const behind = backgroundOf(rgba, width, height);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    const opacity = rgba[from + 3];
    const rest = behind * (255 - opacity);
    data[to++] = (rgba[from] * opacity + rest) / 255; // a Uint8ClampedArray rounds it
    data[to++] = (rgba[from + 1] * opacity + rest) / 255;
    data[to++] = (rgba[from + 2] * opacity + rest) / 255;
  }
  return picture;
}

/**
 * The background that the ink of a transparent picture needs: 255 for white, 0 for black, where the ink is light.
 * Ink counts by its opacity, and where it borders on transparency, since there it is seen or not. The edge of the
 * picture is no such border.
 */
export function backgroundOf(rgba, width, height) {
  const { colours, opacity, columns, rows } = reduced(rgba, width, height);
  const most = opacity.reduce((largest, value) => Math.max(largest, value), 0);
  if (most === 0) return 255;
  const isClear = opacity.map((value) => (value < most / 2 ? 1 : 0));
  const ink = [];
  const border = [];
  for (let y = 0, at = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++, at++) {
      if (isClear[at]) continue;
      ink.push(at);
      const besides = (x > 0 && isClear[at - 1]) || (x < columns - 1 && isClear[at + 1]);
      const above = (y > 0 && isClear[at - columns]) || (y < rows - 1 && isClear[at + columns]);
      if (besides || above) border.push(at);
    }
  }
  let [all, visible] = [0, 0];
  for (const at of border.length ? border : ink) {
    all += opacity[at];
    if (1.05 / (luminance(colours, at, opacity[at]) + 0.05) >= LEAST_CONTRAST) visible += opacity[at];
  }
  return visible >= all / 2 ? 255 : 0;
}

/** Colours times opacity, and opacity, both 0…1, averaged over blocks so that INK_SIDE pixels are left. */
function reduced(rgba, width, height) {
  const factor = Math.max(1, Math.floor(Math.max(width, height) / INK_SIDE));
  const [columns, rows] = [Math.ceil(width / factor), Math.ceil(height / factor)];
  const sums = new Uint32Array(4 * columns * rows);
  const counts = new Uint32Array(columns * rows);
  for (let y = 0, from = 0; y < height; y++) {
    const row = Math.floor(y / factor) * columns;
    for (let x = 0; x < width; x++, from += 4) {
      const block = row + Math.floor(x / factor);
      const alpha = rgba[from + 3];
      if (alpha > 0) {
        sums[4 * block] += ((rgba[from] * alpha) / 255 + 0.5) | 0;
        sums[4 * block + 1] += ((rgba[from + 1] * alpha) / 255 + 0.5) | 0;
        sums[4 * block + 2] += ((rgba[from + 2] * alpha) / 255 + 0.5) | 0;
        sums[4 * block + 3] += alpha;
      }
      counts[block]++;
    }
  }
  const colours = new Float32Array(3 * counts.length);
  const opacity = new Float32Array(counts.length);
  counts.forEach((count, block) => {
    const mean = (channel) => Math.round(sums[4 * block + channel] / count) / 255;
    for (let channel = 0; channel < 3; channel++) colours[3 * block + channel] = mean(channel);
    opacity[block] = mean(3);
  });
  return { columns, rows, colours, opacity };
}

/** Relative luminance of an sRGB colour, as WCAG 2.2 defines it. */
function luminance(colours, at, opacity) {
  const weights = [0.2126, 0.7152, 0.0722];
  let sum = 0;
  for (let channel = 0; channel < 3; channel++) {
    const value = Math.min(1, colours[3 * at + channel] / opacity);
    sum += weights[channel] * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  }
  return sum;
}

// ------------------------------------------------------------------------------------------------------ margins

/**
 * Without its wide margins of one colour: what is left, centred on a square of that colour. A picture that fills its
 * square canvas, or whose corners have different colours, is returned as it is.
 *
 * @param margin width of the new margin, as a share of the larger side of what is in the picture.
 * @param seen pixels of a side that the model sees.
 */
export function trimMargins(picture, margin, seen = 0) {
  const { width, height, step, data } = picture;
  const colour = data.slice(0, 3);
  const corners = [width - 1, (height - 1) * width, height * width - 1];
  const differs = (value, channel) => Math.abs(value - colour[channel]) > SAME_COLOUR;
  if (corners.some((at) => colour.some((_, channel) => differs(data[step * at + channel], channel)))) return picture;
  const boxes = [0, 1, 2].map((channel) => boxOf(picture, channel, colour[channel])).filter(Boolean);
  const isWhole = (box) => box.left === 0 && box.top === 0 && box.right === width && box.bottom === height;
  if (!boxes.length || boxes.some(isWhole)) return picture;
  const [left, top] = ["left", "top"].map((side) => Math.min(...boxes.map((box) => box[side])));
  const [right, bottom] = ["right", "bottom"].map((side) => Math.max(...boxes.map((box) => box[side])));
  const larger = Math.max(right - left, bottom - top);
  const filled = (width > seen ? FILLED : FILLED_SMALL) * width;
  if (isWhole({ left, top, right, bottom }) || (width === height && larger >= filled)) return picture;
  const side = larger + 2 * Math.max(1, roundHalfToEven(margin * larger));
  const square = new Picture(side, side, step);
  for (let at = 0; at < square.data.length; at++) square.data[at] = data[at % step];
  const [x, y] = [(side - (right - left)) >> 1, (side - (bottom - top)) >> 1];
  for (let row = 0; row < bottom - top; row++) {
    const from = step * ((top + row) * width + left);
    square.data.set(data.subarray(from, from + step * (right - left)), step * ((y + row) * side + x));
  }
  return square;
}

/** What of a picture differs from `colour` in a channel: `left`, `top`, and `right`, `bottom` behind it; or null. */
function boxOf({ width, height, step, data }, channel, colour) {
  let [left, top, right, bottom] = [width, height, 0, 0];
  for (let y = 0, at = channel; y < height; y++) {
    for (let x = 0; x < width; x++, at += step) {
      if (data[at] - colour <= SAME_COLOUR && colour - data[at] <= SAME_COLOUR) continue;
      if (x < left) left = x;
      if (x >= right) right = x + 1;
      if (y < top) top = y;
      bottom = y + 1;
    }
  }
  return right ? { left, top, right, bottom } : null;
}

function roundHalfToEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 ? below + 1 : below;
}

// ------------------------------------------------------------------------------------------------------- resize

/** A `Picture` of another size, antialiased. */
export function resize(picture, width, height) {
  const rows = width === picture.width ? picture : resizeRows(picture, width);
  return height === picture.height ? rows : resizeColumns(rows, height);
}

function cubic(distance) {
  const x = Math.abs(distance);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/** For each of `size` new pixels the first old one that it is made of, and what each contributes. */
function filterFor(oldSize, size) {
  const scale = oldSize / size;
  const stretch = Math.max(1, scale); // when it shrinks, the filter covers as many pixels as become one
  const support = FILTER_SUPPORT * stretch;
  return Array.from({ length: size }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(oldSize, Math.trunc(centre + support + 0.5));
    const weights = [];
    for (let pixel = first; pixel < end; pixel++) weights.push(cubic((pixel - centre + 0.5) / stretch));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    const parts = weights.map((weight) => {
      const part = (weight / sum) * FIXED_POINT;
      return part < 0 ? Math.trunc(part - 0.5) : Math.trunc(part + 0.5);
    });
    return { first, parts: Int32Array.from(parts) };
  });
}

// Sums of 8-bit values times parts fit into 32 bits, as in Pillow: integers are twice as fast as floating point.
function toByte(sum) {
  return (sum + FIXED_POINT / 2) >> FIXED_POINT_BITS; // a Uint8ClampedArray clips it
}

function resizeRows({ width: oldWidth, height, step, data }, width) {
  const result = new Picture(width, height);
  const filter = filterFor(oldWidth, width);
  for (let y = 0, to = 0; y < height; y++) {
    for (const { first, parts } of filter) {
      let [red, green, blue] = [0, 0, 0];
      for (let tap = 0, from = step * (y * oldWidth + first); tap < parts.length; tap++, from += step) {
        const part = parts[tap];
        red = (red + Math.imul(part, data[from])) | 0;
        green = (green + Math.imul(part, data[from + 1])) | 0;
        blue = (blue + Math.imul(part, data[from + 2])) | 0;
      }
      result.data[to++] = toByte(red);
      result.data[to++] = toByte(green);
      result.data[to++] = toByte(blue);
    }
  }
  return result;
}

function resizeColumns(picture, height) {
  const result = new Picture(picture.width, height, picture.step);
  const stride = picture.step * picture.width;
  const { data } = picture;
  filterFor(picture.height, height).forEach(({ first, parts }, y) => {
    for (let at = 0; at < stride; at++) {
      let sum = 0;
      for (let tap = 0, from = first * stride + at; tap < parts.length; tap++, from += stride) {
        sum = (sum + Math.imul(parts[tap], data[from])) | 0;
      }
      result.data[y * stride + at] = toByte(sum);
    }
  });
  return result;
}

// ------------------------------------------------------------------------------------------------- pixel values

/**
 * What `toPixelValues` needs to know, of an exported model's preprocessor_config.json.
 *
 * @throws Error where it asks for something that is not done here.
 */
export function settingsOf(config) {
  const { size, image_mean, image_std, rescale_factor, trim_to_margin = null } = config;
  const known = {
    resample: config.resample === 3,
    size: size?.height > 0 && size?.width > 0,
    do_center_crop: !config.do_center_crop,
    do_resize: config.do_resize !== false,
    do_rescale: config.do_rescale !== false,
    do_normalize: config.do_normalize !== false,
  };
  const unknown = Object.keys(known).find((name) => !known[name]);
  if (unknown) throw new Error(`${unknown}: ${JSON.stringify(config[unknown])} is nothing that can be done here`);
  return { width: size.width, height: size.height, mean: image_mean, std: image_std, rescale_factor, trim_to_margin };
}

/**
 * A picture as the model takes it.
 *
 * @param rgba (height, width, 4) bytes, colours not multiplied by opacity.
 * @param settings `width`, `height`, `mean`, `std`, `rescale_factor`, `trim_to_margin` (null: margins stay).
 * @returns Float32Array (channels, height, width).
 */
export function toPixelValues(rgba, width, height, settings) {
  let picture = overBackground(rgba, width, height);
  const seen = Math.max(settings.width, settings.height);
  if (settings.trim_to_margin !== null) picture = trimMargins(picture, settings.trim_to_margin, seen);
  picture = resize(picture, settings.width, settings.height);
  const area = picture.width * picture.height;
  const values = new Float32Array(3 * area);
  for (let channel = 0; channel < 3; channel++) {
    const [mean, std] = [settings.mean[channel], settings.std[channel]];
    for (let at = 0, from = channel; at < area; at++, from += picture.step) {
      values[channel * area + at] = (picture.data[from] * settings.rescale_factor - mean) / std;
    }
  }
  return values;
}
