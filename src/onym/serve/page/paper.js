// The sheet that one writes on. A transparent textarea takes the typing; a layer under it, laid out alike, shows the same text in colours. The browser's
// own editing, selection, spelling, screen readers and phone keyboards work as in any textarea, and 100 kB of text cost one text node.
import { debounced, el } from "./elements.js";
import { percent } from "./format.js";
import { difference, edited, History, textOf } from "./text.js";

let papers = 0;

export class Paper {
  /** `choose(token, alternative)` is called when an alternative was clicked; `changed()` after each change of the text. */
  constructor({ label, placeholder, choose, changed }) {
    papers += 1;
    this.parts = [];
    this.history = new History();
    this.choose = choose;
    this.changed = changed;
    this.typing = debounced(() => (this.burst = false), 1000);
    this.nodes = [];
    this.layer = el("div", { className: "layer", "aria-hidden": "true" }, "\u200b");
    this.area = el("textarea", { id: `paper-${papers}`, "aria-label": label, placeholder, spellcheck: false, autocapitalize: "off", "aria-describedby": `paper-hint-${papers}` });
    this.card = el("div", { className: "card", hidden: true, role: "group", "aria-label": "Token and its alternatives" });
    this.sheet = el("div", { className: "sheet" }, this.layer, this.area, this.card);
    const hint = el("span", { id: `paper-hint-${papers}`, className: "unseen" }, "In text that the model wrote, the token at the caret shows its alternatives: press Alt and the arrow down to go to them.");
    this.node = el("div", { className: "paper" }, this.sheet, hint);
    this.#listen();
  }

  get text() {
    return textOf(this.parts);
  }

  /** Shows other parts, at the next frame: a hundred tokens a second need no hundred layouts. */
  show(parts) {
    this.parts = parts;
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => this.render());
  }

  render() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const atEnd = this.node.scrollTop + this.node.clientHeight > this.node.scrollHeight - 40;
    const text = this.text;
    if (this.area.value !== text) {
      const { selectionStart, selectionEnd } = this.area;
      const caretAtEnd = selectionEnd === this.area.value.length;
      this.area.value = text;
      if (caretAtEnd && selectionStart === selectionEnd) this.area.setSelectionRange(text.length, text.length);
      else this.area.setSelectionRange(selectionStart, selectionEnd);
    }
    this.#renderLayer();
    if (atEnd) this.node.scrollTop = this.node.scrollHeight;
    this.changed();
  }

  #renderLayer() {
    const { nodes, parts } = this;
    let same = 0;
    while (same < nodes.length && same < parts.length && nodes[same].piece === parts[same]) same += 1;
    let tail = 0;
    while (tail < Math.min(nodes.length, parts.length) - same && nodes.at(-1 - tail).piece === parts.at(-1 - tail)) tail += 1;
    for (const node of nodes.slice(same, nodes.length - tail)) node.remove();
    const fresh = parts.slice(same, parts.length - tail).map((part) => {
      const node = el("span", { className: part.by === "model" ? "model" : "" }, part.text);
      node.piece = part;
      return node;
    });
    const following = nodes[nodes.length - tail] ?? this.layer.lastChild; // a zero-width space stays last: it gives a last empty line its height
    following.before(...fresh);
    nodes.splice(same, nodes.length - tail - same, ...fresh);
  }

  /** Makes an entry of the history of what is shown now. */
  save() {
    this.burst = false;
    this.history.save(this.parts);
  }

  undo() {
    this.hideCard();
    this.burst = false;
    this.show(this.history.undo(this.parts));
  }

  redo() {
    this.show(this.history.redo(this.parts));
  }

  #listen() {
    const { area, card, sheet } = this;
    area.addEventListener("input", () => {
      const before = this.text;
      if (!this.burst) this.history.save(this.parts);
      this.burst = true;
      this.typing();
      this.parts = edited(this.parts, ...difference(before, area.value));
      this.hideCard();
      this.#renderLayer();
      this.changed();
    });
    area.addEventListener("keydown", (event) => {
      const z = event.key.toLowerCase() === "z";
      if ((event.ctrlKey || event.metaKey) && (z || event.key === "y") && !area.readOnly) {
        event.preventDefault(); // the browser's own undo does not know what the model wrote
        if (z && !event.shiftKey) this.undo();
        else this.redo();
      } else if (event.altKey && event.key === "ArrowDown" && !card.hidden) {
        event.preventDefault();
        card.querySelector("button")?.focus();
      } else if (event.key === "Escape") this.hideCard();
    });
    document.addEventListener("selectionchange", () => document.activeElement === area && !area.readOnly && this.#cardAtCaret());
    area.addEventListener("pointermove", (event) => {
      if (event.pointerType === "touch" || event.buttons) return;
      const node = document.elementsFromPoint(event.clientX, event.clientY).find((other) => other.piece?.token && this.layer.contains(other));
      if (node === this.hovered) return;
      this.hovered = node;
      clearTimeout(this.hover);
      this.hover = setTimeout(() => (node ? this.#showCard(node) : this.#cardAtCaret()), node ? 120 : 300);
    });
    sheet.addEventListener("pointerleave", () => {
      clearTimeout(this.hover);
      this.hovered = null;
      this.hover = setTimeout(() => !card.contains(document.activeElement) && this.#cardAtCaret(), 300);
    });
    card.addEventListener("pointerenter", () => clearTimeout(this.hover));
    card.addEventListener("keydown", (event) => {
      const buttons = [...card.querySelectorAll("button")];
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (step) buttons.at((buttons.indexOf(document.activeElement) + step) % buttons.length).focus();
      else if (event.key === "Escape") {
        area.focus();
        this.hideCard();
      } else return;
      event.preventDefault();
      event.stopPropagation();
    });
  }

  #cardAtCaret() {
    const { area } = this;
    const caret = area.selectionStart;
    let end = 0;
    const node = document.activeElement === area && caret === area.selectionEnd && !area.readOnly ? this.nodes.find((other) => (end += other.piece.text.length) > caret) : null;
    if (node?.piece.token) this.#showCard(node);
    else this.hideCard();
  }

  hideCard() {
    this.card.hidden = true;
    this.marked?.classList.remove("marked");
  }

  #showCard(node) {
    if (!node.isConnected) return;
    const { token, text } = node.piece;
    this.hideCard();
    this.marked = node;
    node.classList.add("marked");
    const rows = token.alternatives.map((other) => this.#alternative(token, other));
    if (!token.alternatives.some((other) => other.id === token.id)) rows.push(this.#alternative(token, { ...token, text }));
    this.card.replaceChildren(el("p", {}, el("b", {}, visible(text)), ` had a probability of ${percent(Math.exp(token.logprob))}`), el("ol", {}, ...rows));
    this.card.hidden = false;
    const line = [...node.getClientRects()].at(-1);
    const sheet = this.sheet.getBoundingClientRect();
    if (!line) return;
    this.card.style.top = `${line.bottom - sheet.top + 4}px`;
    this.card.style.left = `${Math.max(8, Math.min(line.left - sheet.left, sheet.width - this.card.offsetWidth - 8))}px`;
    if (line.bottom + this.card.offsetHeight > this.node.getBoundingClientRect().bottom && line.top - sheet.top > this.card.offsetHeight) this.card.style.top = `${line.top - sheet.top - this.card.offsetHeight - 4}px`;
  }

  #alternative(token, other) {
    const chosen = other.id === token.id;
    const bar = el("span", { className: "bar" });
    bar.style.width = `${Math.max(1, 100 * Math.exp(other.logprob))}%`;
    const button = el("button", { type: "button", onclick: () => this.choose(token, other) }, el("span", { className: "token" }, visible(other.text)), el("span", { className: "probability" }, percent(Math.exp(other.logprob))), bar);
    if (chosen) button.setAttribute("aria-current", "true");
    return el("li", {}, button);
  }
}

/** A token's text with its white space made visible. */
function visible(text) {
  if (text === "") return "(part of a character)";
  if (/^token_id:\d+$/.test(text)) return `(part of a character, ${text.slice(9)})`;
  return text.replace(/^ /, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

