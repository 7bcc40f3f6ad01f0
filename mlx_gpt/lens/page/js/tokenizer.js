// Byte-level byte-pair encoding, as in text/tokenizer.py: the same ids as Python's Tokenizer.encode_prompt.

const EOT = "<|endoftext|>";

// GPT-2's words: contractions, letters, digits, punctuation (each with at most one leading space), and white space,
// which is Unicode's: JavaScript's \s lacks U+0085 and has U+FEFF.
const WORDS = new RegExp(
  "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+"
  + "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}", "gu");
const LEADING_SPACE = /^\p{White_Space}*/u;
const TRAILING_SPACE = /\p{White_Space}*$/u;
const OF_WORD = /^[\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\u200c\u200d]$/u;

// In GPT-2's files each byte is one visible character: itself if printable, else the next of U+0100, U+0101, ...
const PRINTABLE = [[33, 127], [161, 173], [174, 256]];
const CHARACTERS = Array.from({ length: 256 }, () => null);
for (const [start, end] of PRINTABLE) {
  for (let byte = start; byte < end; byte++) CHARACTERS[byte] = String.fromCharCode(byte);
}
let nextCharacter = 256;
for (let byte = 0; byte < 256; byte++) CHARACTERS[byte] ??= String.fromCharCode(nextCharacter++);
const BYTE_OF = new Map(CHARACTERS.map((character, byte) => [character, byte]));

/** Return the tokenizer of a page's data. */
export function makeTokenizer(data) {
  return data.kind === "characters" ? new CharacterTokenizer(data) : new Tokenizer(data);
}

/**
 * A byte-level BPE tokenizer. `tokens` lists each id's bytes, written as visible characters, or null; `specials` maps
 * any other token's text to its id. The other fields are those of TokenSettings.
 */
export class Tokenizer {
  constructor({ tokens, specials, added, prefix, suffix, opening, ends, start, add_prefix_space }) {
    Object.assign(this, { added, prefix, suffix, opening, ends, start });
    this.addPrefixSpace = add_prefix_space;
    this.ranks = new Map(tokens.map((name, id) => [name, id]).filter(([name]) => name !== null));
    this.bytes = new Map([...this.ranks].map(([name, id]) => [id, [...name].map((c) => BYTE_OF.get(c))]));
    for (const [text, id] of Object.entries(specials)) this.bytes.set(id, [...new TextEncoder().encode(text)]);
    this.words = new Map(); // the ids of words that were encoded before
  }

  /** Encode a prompt: documents between <|endoftext|>, special tokens, and what the model expects around a text. */
  encode(text) {
    const [first, ...others] = wellFormed(text).split(EOT);
    const ids = this.encodeDocument(first);
    for (const document of others) {
      ids.push(this.ends[0], ...this.opening, ...this.encodeDocument(document.replace(/^\n+/, "")));
    }
    return [...this.prefix, ...ids, ...this.suffix];
  }

  encodeDocument(text) {
    const ids = [];
    for (const part of splitAtTokens(text, this.added)) {
      if (typeof part === "number") {
        ids.push(part);
      } else {
        const space = this.addPrefixSpace && !part.startsWith(" ") ? " " : "";
        for (const word of (space + part).match(WORDS)) ids.push(...this.encodeWord(word));
      }
    }
    return ids;
  }

  encodeWord(word) {
    if (!this.words.has(word)) {
      const name = Array.from(new TextEncoder().encode(word), (byte) => CHARACTERS[byte]).join("");
      const parts = this.ranks.has(name) ? [name] : mergeBytes(name, this.ranks);
      this.words.set(word, parts.map((part) => this.ranks.get(part)));
    }
    return this.words.get(word);
  }

  /** Decode ids to text; invalid UTF-8 becomes U+FFFD. */
  decode(ids) {
    const bytes = ids.flatMap((id) => this.bytes.get(id) ?? []);
    return this.decodeBytes(new Uint8Array(bytes));
  }

  decodeBytes(bytes) {
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
  }

  /** Return the text of one id, "" for an id that no token has. Bytes that are no whole character become "\\xe2". */
  tokenText(id) {
    const bytes = new Uint8Array(this.bytes.get(id) ?? []);
    let text = "";
    for (let i = 0; i < bytes.length; ) {
      const length = [1, 2, 3, 4].find((n) => isCharacter(bytes.subarray(i, i + n)));
      text += length ? this.decodeBytes(bytes.subarray(i, i + length)) : `\\x${bytes[i].toString(16)}`;
      i += length ?? 1;
    }
    return text;
  }

  /** Return whether a token has this id; a model may have more. */
  has(id) {
    return this.bytes.has(id);
  }
}

/** Raised for a character that a character model does not have. */
export class UnknownCharacter extends Error {
  name = "UnknownCharacter";
}

/** The tokenizer of nanoGPT's character models (text/characters.py): `characters` lists the one of each id. */
export class CharacterTokenizer {
  constructor({ characters, start }) {
    Object.assign(this, { characters, start, ends: [] });
    this.ids = new Map(characters.map((character, id) => [character, id]));
  }

  encode(text) {
    return Array.from(text, (character) => {
      if (this.ids.has(character)) return this.ids.get(character);
      const known = `the model knows ${this.ids.size} characters`;
      throw new UnknownCharacter(`${known}, and ${JSON.stringify(character)} is none of them`);
    });
  }

  decode(ids) {
    return ids.map((id) => this.characters[id] ?? "").join("");
  }

  tokenText(id) {
    return this.decode([id]);
  }

  has(id) {
    return id < this.characters.length;
  }
}

/** Apply BPE: merge the adjacent pair with the lowest id, until no pair is a token. Takes and returns names. */
export function mergeBytes(name, ranks) {
  const parts = [...name];
  const rankAt = (i) => (i < parts.length - 1 ? ranks.get(parts[i] + parts[i + 1]) ?? Infinity : Infinity);
  const pairs = parts.map((_, i) => rankAt(i)); // the id of each part and the next
  for (;;) {
    let first = 0;
    for (let i = 1; i < pairs.length; i++) if (pairs[i] < pairs[first]) first = i;
    if (pairs[first] === Infinity) return parts;
    parts.splice(first, 2, parts[first] + parts[first + 1]);
    pairs.splice(first, 1);
    pairs[first] = rankAt(first);
    if (first > 0) pairs[first - 1] = rankAt(first - 1);
  }
}

/** Return the ids of the added tokens in a text and the texts between them (text/added_tokens.py). */
export function splitAtTokens(text, tokens) {
  let parts = text ? [text] : [];
  for (const normalized of [false, true]) {
    const wanted = tokens.filter((token) => token.normalized === normalized);
    if (wanted.length) parts = parts.flatMap((part) => (typeof part === "number" ? [part] : splitAt(part, wanted)));
  }
  return parts;
}

/** Split a text at tokens: at the first in the text, and of several there at the longest. */
function splitAt(text, tokens) {
  const known = new Map(tokens.map((token) => [token.text, token]));
  const escaped = [...known.keys()].sort((a, b) => b.length - a.length).map(
    (token) => token.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
  const parts = [];
  let start = 0;
  for (const found of text.matchAll(new RegExp(escaped.join("|"), "gu"))) {
    const token = known.get(found[0]);
    let begin = found.index;
    let end = begin + found[0].length;
    const around = [[...text.slice(0, begin)].at(-1), [...text.slice(end)][0]];
    if (token.single_word && around.some(isOfWord)) continue;
    if (token.lstrip) begin -= text.slice(start, begin).match(TRAILING_SPACE)[0].length;
    if (token.rstrip) end += text.slice(end).match(LEADING_SPACE)[0].length;
    if (start < begin) parts.push(text.slice(start, begin));
    parts.push(token.id);
    start = end;
  }
  if (start < text.length) parts.push(text.slice(start));
  return parts;
}

/** Return whether the bytes are UTF-8 without a cut or invalid character. */
function isCharacter(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes) !== undefined;
  } catch {
    return false;
  }
}

function isOfWord(character) {
  return character !== undefined && OF_WORD.test(character);
}

/** Replace halves of surrogate pairs by U+FFFD. */
function wellFormed(text) {
  return text.replace(/\p{Surrogate}/gu, "\ufffd");
}
