// One text and the model that goes on from it. The page has one, or two to compare.
import { chunks, json } from "./api.js";
import { el } from "./elements.js";
import { count } from "./format.js";
import { Meter } from "./meter.js";
import { ModelChooser } from "./models.js";
import { Paper } from "./paper.js";
import { Continuation, textOf } from "./text.js";

export class Pane {
  /** `page` gives `sampling`, and is called on changes: changed(), busy(), failed(error, again), chose(). */
  constructor(page, name) {
    this.page = page;
    this.abort = null;
    this.base = null; // the parts that the last continuation began from: for Retry
    this.models = new ModelChooser(name ? `Model ${name}` : "Model", () => page.chose());
    this.paper = new Paper({ label: name ? `Text ${name}` : "Text", placeholder: "Write the beginning of a text here…", choose: (token, other) => this.#choose(token, other), changed: () => page.changed() });
    this.status = el("p", { className: "meter" });
    this.meter = new Meter(this.status);
    this.node = el("section", { className: "pane", "aria-label": name ? `Pane ${name}` : "Text and model" }, this.models.node, this.paper.node, this.status);
  }

  get busy() {
    return this.abort !== null;
  }

  /** The request that continues `prompt` (text, or token ids). */
  request(prompt) {
    return { model: this.models.value, prompt, ...this.page.sampling.fields(), logprobs: 5, slide: true, return_token_ids: true };
  }

  /** Writes on from `base`: what the paper shows, or (Retry) what it showed before. */
  async write(base = this.paper.parts) {
    await this.stop();
    this.paper.save();
    this.base = base;
    this.paper.show(base);
    await this.#continue(this.request(textOf(base)), base, { promptIds: null, ids: [] }, () => this.write());
  }

  async stop() {
    this.abort?.abort();
    await this.running;
  }

  async #continue(body, before, writing, again) {
    const abort = new AbortController();
    this.abort = abort;
    this.paper.area.readOnly = true;
    this.paper.hideCard();
    this.page.busy();
    this.meter.start();
    this.running = this.#stream(body, before, writing, abort.signal)
      .catch((error) => {
        this.meter.end(abort.signal.aborted ? "stopped" : "not finished");
        if (!abort.signal.aborted) this.page.failed(error, again);
      })
      .finally(() => {
        this.abort = null;
        this.paper.area.readOnly = false;
        this.page.busy();
      });
    await this.running;
  }

  async #stream(body, before, writing, signal) {
    const continuation = new Continuation(before, writing);
    let reason = null;
    let usage = null;
    try {
      for await (const chunk of chunks("/v1/completions", body, signal)) {
        usage = chunk.usage ?? usage;
        const choice = chunk.choices[0];
        if (!choice) continue;
        reason = choice.finish_reason ?? reason;
        this.meter.add((choice.token_ids ?? choice.logprobs?.token_ids ?? [1]).length);
        this.paper.show(continuation.take(choice));
      }
    } finally {
      this.paper.render(); // who reads that it has ended finds all of the text
    }
    const context = this.models.chosen?.max_model_len;
    const slid = context && usage?.total_tokens > context ? `the model saw the last ${count(context)} tokens` : null;
    this.meter.end([`seed ${body.seed}`, reason === "stop" ? "ended by itself" : null, slid].filter(Boolean).join(" · "));
  }

  /** Puts an alternative in a token's place and writes on from there. Ids are sent, since its text alone might be split into other tokens. */
  async #choose(token, other) {
    await this.stop();
    this.paper.hideCard();
    const at = this.paper.parts.findIndex((part) => part.token === token);
    if (at < 0) return;
    const ids = [...token.writing.ids.slice(0, token.index), other.id];
    const writing = { promptIds: token.writing.promptIds, ids };
    try {
      const text = await this.#textOfAlternative(token, other);
      this.paper.save();
      const before = [...this.paper.parts.slice(0, at), { text, by: "model", token: { ...token, id: other.id, logprob: other.logprob, writing } }];
      this.paper.show(before);
      this.paper.area.focus({ preventScroll: true });
      await this.#continue(this.request([...writing.promptIds, ...ids]), before, writing, () => this.#choose(token, other));
    } catch (error) {
      this.page.failed(error, () => this.#choose(token, other));
    }
  }

  /** A token that is a part of a character has no text of its own: what it adds to the tokens before it is asked of the server. */
  async #textOfAlternative(token, other) {
    if (!/^token_id:\d+$/.test(other.text)) return other.text;
    const before = token.writing.ids.slice(0, token.index);
    const [shorter, longer] = await Promise.all([before, [...before, other.id]].map((tokens) => json("/detokenize", { body: { model: this.models.value, tokens } })));
    return longer.prompt.slice(shorter.prompt.length).replaceAll("\ufffd", "");
  }
}
