// The sampling controls: one row of data each; the values go into a request as they are.
import { byId, el, store, stored } from "./elements.js";

const STORED = "onym.sampling";
const LARGEST_SEED = 2 ** 31 - 1;

const CONTROLS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8, hint: "Lower is safer, higher is more surprising; 0 always takes the most likely token." },
  { name: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.01, value: 1, hint: "Only the likeliest tokens that together have this probability; 1 is off." },
  { name: "top_k", label: "Top-k", min: 0, max: 200, step: 1, value: 0, hint: "Only so many of the likeliest tokens; 0 is off." },
  { name: "min_p", label: "Min-p", min: 0, max: 0.5, step: 0.01, value: 0, hint: "Only tokens with this share of the likeliest one's probability; 0 is off." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.01, value: 1, hint: "Makes tokens that were used before less likely; 1 is off." },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 2048, step: 1, value: 128, number: true, hint: "How many tokens to write at most." },
];

export class Sampling {
  constructor(root) {
    const saved = stored(STORED, {});
    this.inputs = {};
    for (const control of CONTROLS) root.append(this.#row(control, saved[control.name]));
    this.stop = el("textarea", { id: "stop", rows: 2, spellcheck: false, value: saved.stop ?? "", "aria-describedby": "stop-hint" });
    root.append(el("div", { className: "control" }, el("label", { htmlFor: "stop" }, "Stop strings"), this.stop, el("p", { id: "stop-hint", className: "hint" }, "Writing ends before any of these, one a line, four at most; \\n is a new line.")));
    this.seed = el("input", { id: "seed", type: "number", min: 0, max: LARGEST_SEED, step: 1, value: saved.seed ?? 0, "aria-describedby": "seed-hint" });
    this.fixed = el("input", { id: "fixed", type: "checkbox", checked: saved.fixed ?? false });
    root.append(el("div", { className: "control" }, el("label", { htmlFor: "seed" }, "Seed"), el("span", { className: "row" }, this.seed, el("label", { className: "check" }, this.fixed, "Fixed")), el("p", { id: "seed-hint", className: "hint" }, "The same seed, text and settings give the same continuation. It is drawn anew for each text, or fixed.")));
    if (!saved.seed) this.#draw();
    this.seed.addEventListener("input", () => (this.fixed.checked = true)); // whoever types a seed wants it
    root.addEventListener("input", () => this.#save());
    byId("reset").addEventListener("click", () => {
      for (const control of CONTROLS) this.#set(control, control.value);
      this.stop.value = "";
      this.fixed.checked = false;
      this.#save();
    });
  }

  #row(control, saved) {
    const { name, label, min, max, step, hint } = control;
    const input = el("input", { id: name, type: control.number ? "number" : "range", min, max, step, "aria-describedby": `${name}-hint` });
    const shown = control.number ? null : el("output", { htmlFor: name });
    this.inputs[name] = { input, shown };
    input.addEventListener("input", () => shown && (shown.textContent = input.value));
    input.addEventListener("change", () => this.#set(control, input.valueAsNumber));
    this.#set(control, saved ?? control.value);
    return el("div", { className: "control" }, el("label", { htmlFor: name }, label), shown, input, el("p", { id: `${name}-hint`, className: "hint" }, hint));
  }

  #set({ name, min, max, value }, number) {
    const { input, shown } = this.inputs[name];
    input.value = Number.isFinite(number) ? Math.min(max, Math.max(min, number)) : value;
    if (shown) shown.textContent = input.value;
  }

  #save() {
    const seed = this.seed.valueAsNumber;
    store(STORED, { ...this.#values(), stop: this.stop.value, seed: Number.isFinite(seed) ? seed : 0, fixed: this.fixed.checked });
  }

  #draw() {
    this.seed.value = crypto.getRandomValues(new Uint32Array(1))[0] % LARGEST_SEED;
  }

  /** A new seed for a new text, unless it is fixed. */
  renewSeed() {
    if (!this.fixed.checked || !Number.isFinite(this.seed.valueAsNumber)) this.#draw();
    this.#save();
  }

  #values() {
    return Object.fromEntries(CONTROLS.map(({ name, value }) => [name, Number.isFinite(this.inputs[name].input.valueAsNumber) ? this.inputs[name].input.valueAsNumber : value]));
  }

  /** The fields of a request. */
  fields() {
    const stops = this.stop.value.split("\n").filter((line) => line !== "").slice(0, 4);
    const unescaped = stops.map((line) => line.replace(/\\([nt\\])/g, (_, letter) => ({ n: "\n", t: "\t", "\\": "\\" })[letter]));
    return { ...this.#values(), seed: Math.trunc(this.seed.valueAsNumber) || 0, stop: unescaped };
  }
}
