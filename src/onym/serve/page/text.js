// The text as a list of parts: what the person wrote, and the tokens that a model wrote. Parts are never changed, only replaced, so that an earlier
// list of parts is an earlier state of the text (Undo), and the layer that shows them sees by identity what is new.
//
// A part is {text, by: "you" | "model", token: null | Token}. A Token is {id, logprob, alternatives: [{id, text, logprob}], writing, index};
// its writing is {promptIds, ids}: the ids that the model had read, and the ids that it wrote: what came before a token is promptIds + ids[:index].

export const textOf = (parts) => parts.map((part) => part.text).join("");

/** The parts after the characters from `start` to `end` were replaced by what was typed. Tokens after the edit lose their alternatives: these were for another text. */
export function edited(parts, start, end, typed) {
  const result = [];
  const add = (text, by) => {
    if (text === "") return;
    const last = result.at(-1);
    if (last && last.token === null && last.by === by) result[result.length - 1] = { text: last.text + text, by, token: null };
    else result.push({ text, by, token: null });
  };
  let position = 0;
  let inserted = false;
  for (const part of parts) {
    const from = position;
    position += part.text.length;
    if (position <= start && !(position === start && part.by === "you")) {
      result.push(part);
      continue;
    }
    add(part.text.slice(0, Math.max(0, start - from)), part.by);
    if (!inserted) add(typed, "you");
    inserted = true;
    add(part.text.slice(Math.min(part.text.length, Math.max(0, end - from))), part.by);
  }
  if (!inserted) add(typed, "you");
  return result;
}

/** Where two texts differ, as [start, end in the old text, what stands there in the new one]. */
export function difference(before, after) {
  const longest = Math.min(before.length, after.length);
  let start = 0;
  while (start < longest && before[start] === after[start]) start += 1;
  let tail = 0;
  while (tail < longest - start && before[before.length - 1 - tail] === after[after.length - 1 - tail]) tail += 1;
  return [start, before.length - tail, after.slice(start, after.length - tail)];
}

/** The alternatives of a token, the most likely first. A JavaScript object moves keys like "7" to its front, so that the order comes from the values. */
function alternatives(log, i) {
  const ids = log.top_token_ids[i] ?? [];
  const entries = Object.entries(log.top_logprobs[i] ?? {}).sort((a, b) => b[1] - a[1]);
  return ids.slice(0, entries.length).map((id, rank) => ({ id, text: entries[rank][0], logprob: entries[rank][1] }));
}

/** Puts a streamed continuation together. A token's text ends where the next one's begins; the server counts in code points and holds incomplete characters back. */
export class Continuation {
  constructor(before, writing) {
    this.before = before; // the parts that stand before it
    this.writing = writing;
    this.first = writing.ids.length; // after an alternative was chosen, earlier tokens of this writing are in `before`
    this.characters = []; // code points
    this.offsets = [];
    this.tokens = [];
    this.parts = [];
  }

  /** Takes one choice of a chunk; returns the parts of the whole text. */
  take(choice) {
    if (choice.prompt_token_ids) this.writing.promptIds ??= choice.prompt_token_ids;
    for (const character of choice.text) this.characters.push(character);
    const log = choice.logprobs;
    for (const [i, id] of (log?.token_ids ?? []).entries()) {
      this.offsets.push(log.text_offset[i]);
      this.tokens.push({ id, logprob: log.token_logprobs[i], alternatives: alternatives(log, i), writing: this.writing, index: this.writing.ids.length });
      this.writing.ids.push(id);
    }
    // The last part may have grown: it is made anew, with those that follow.
    let i = Math.max(0, this.parts.length - 1);
    this.parts.length = i;
    for (; i < this.tokens.length; i += 1) this.parts.push({ text: this.characters.slice(this.offsets[i], this.offsets[i + 1]).join("").replaceAll("\r", ""), by: "model", token: this.tokens[i] });
    if (!this.tokens.length && this.characters.length) this.parts = [{ text: this.characters.join(""), by: "model", token: null }];
    return [...this.before, ...this.parts];
  }
}

/** States of the text to go back to, and forward again. */
export class History {
  constructor() {
    this.past = [];
    this.future = [];
  }

  save(state) {
    if (this.past.at(-1) === state) return;
    this.past.push(state);
    if (this.past.length > 100) this.past.shift();
    this.future = [];
  }

  undo(now) {
    return this.#step(this.past, this.future, now);
  }

  redo(now) {
    return this.#step(this.future, this.past, now);
  }

  #step(from, to, now) {
    if (!from.length) return now;
    to.push(now);
    return from.pop();
  }
}
