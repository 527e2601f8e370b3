// Words to token ids, by the rules of the model's Python processor.

/** What a visitor can put right. */
export class Refusal extends Error {}

/**
 * Token ids of a text: `[BOS] words [EOS]`, cut to what the model reads.
 *
 * @param tokenizer of @huggingface/tokenizers.
 * @param settings `limit`, the most tokens; `wordless`, ids of tokens that say nothing.
 * @returns `ids`, and whether the text was `cut`.
 * @throws Refusal for a text of which the tokenizer knows no word: all of them would have one embedding.
 */
export function tokenize(tokenizer, text, settings) {
  const whole = Array.from(tokenizer.encode(text).ids);
  const cut = whole.length > settings.limit;
  const ids = cut ? [...whole.slice(0, settings.limit - 1), whole.at(-1)] : whole;
  if (ids.every((id) => settings.wordless.includes(id))) {
    throw new Refusal(`The model knows no word of “${shortened(text)}”. It reads English: say it in other words.`);
  }
  return { ids, cut };
}

export function shortened(text, characters = 40) {
  const letters = Array.from(text.trim());
  return letters.length > characters ? `${letters.slice(0, characters).join("")}…` : letters.join("");
}
