// The data that Python put into the page.

import { readTensors } from "./blob.js";
import { Model } from "./model.js";
import { RecordedModel, RecordedTokenizer } from "./recorded.js";
import { makeTokenizer } from "./tokenizer.js";

/** Return the model and the tokenizer of a page's data, and the model's config. */
export async function readPage(data) {
  const { kind, config, recordings } = data;
  if (kind === "recorded") {
    return { model: new RecordedModel(config, recordings), tokenizer: new RecordedTokenizer(data.tokenizer), config };
  }
  return { model: new Model(config, await readTensors(data)), tokenizer: makeTokenizer(data.tokenizer), config };
}
