// How fast a model writes: time to the first token, and tokens a second since then.
import { count } from "./format.js";

export class Meter {
  constructor(node) {
    this.node = node;
  }

  start() {
    this.begun = performance.now();
    this.first = null;
    this.tokens = 0;
    this.node.textContent = "Waiting for the first token…";
  }

  add(tokens) {
    if (!tokens) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.firstTokens ??= this.tokens + tokens;
    this.tokens += tokens;
    this.#show();
  }

  /** Ends with a sentence for screen readers: while tokens come, the numbers are not read out. */
  end(note) {
    if (this.first === null) this.node.textContent = note;
    else this.#show(note);
  }

  #show(note) {
    const later = this.tokens - this.firstTokens;
    const speed = later > 0 ? `${(later / ((this.last - this.first) / 1000)).toFixed(1)} tokens/s` : null;
    const first = `first after ${Math.round(this.first - this.begun)} ms`;
    this.node.textContent = [`${count(this.tokens)} token${this.tokens === 1 ? "" : "s"}`, speed, first, note].filter(Boolean).join(" · ");
  }
}
