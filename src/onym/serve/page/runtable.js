// The table of runs. Only the first rows are in the page, more when one scrolls to them: of a thousand runs the first hundred are seen at once.
import { byId, el, setText } from "./elements.js";
import { compact, count, duration, loss, moment } from "./format.js";

const ROWS = 100;
const STATES = ["running", "interrupted", "finished", "killed"];

// title, text of a cell, value to sort by, class
const COLUMNS = [
  ["Run", (run) => run.name, (run) => run.name, "name"],
  ["State", (run) => run.status, (run) => run.status, "state"],
  ["Step", (run) => (run.steps ? `${count(run.step)} / ${count(run.steps)}` : count(run.step)), (run) => run.step, "step number"],
  ["ETA", (run) => duration(run.eta_seconds), (run) => run.eta_seconds, "wide number"],
  ["Training loss", (run) => loss(run.train_loss), (run) => run.train_loss, "middle number"],
  ["Held-out loss", (run) => loss(run.held_out), (run) => run.held_out, "number"],
  ["Best", (run) => loss(run.best), (run) => run.best, "middle number"],
  ["Tokens/s", (run) => compact(run.tokens_per_second), (run) => run.tokens_per_second, "wide number"],
  ["Saved", (run) => moment(run.saved), (run) => run.saved ?? "", "wide number"],
];

export class RunTable {
  /** `draw(name, chosen)` is called when a check box changed. */
  constructor(draw) {
    this.runs = new Map();
    this.rows = new Map();
    this.colors = new Map(); // name -> "--c0": the runs that are drawn
    this.sort = { column: null, descending: false }; // null: newest first
    this.limit = ROWS;
    this.draw = draw;
    this.body = byId("runs-body");
    this.more = byId("more-runs");
    this.filter = byId("filter");
    this.heads = COLUMNS.map(([title, , , kind], i) => el("th", { scope: "col", className: kind }, el("button", { type: "button", onclick: () => this.#sortBy(i) }, title)));
    byId("runs-head").append(el("th", { scope: "col", className: "check-cell" }, el("span", { className: "unseen" }, "Drawn")), ...this.heads);
    this.filter.addEventListener("input", () => {
      this.limit = ROWS;
      this.show();
    });
    this.more.addEventListener("click", () => this.#showMore());
    new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && this.#showMore(), { root: byId("runs-scroller"), rootMargin: "400px" }).observe(this.more);
  }

  #showMore() {
    if (this.more.hidden) return;
    this.limit += ROWS;
    this.show();
  }

  #sortBy(column) {
    const same = this.sort.column === column;
    if (same && this.sort.descending) this.sort = { column: null, descending: false };
    else this.sort = { column, descending: same };
    this.heads.forEach((head, i) => (i === this.sort.column ? head.setAttribute("aria-sort", this.sort.descending ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
    this.show();
  }

  /** The runs that the filter leaves, in order. Runs without a value come last, whichever way one sorts. */
  #listed() {
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const runs = [...this.runs.values()].filter((run) => words.every((word) => `${run.name} ${run.status}`.toLowerCase().includes(word)));
    const { column, descending } = this.sort;
    const key = column === null ? (run) => run.started ?? run.changed : COLUMNS[column][2];
    const down = column === null || descending ? -1 : 1;
    const known = (item) => item !== null && item !== undefined && item !== "";
    return runs
      .map((run) => [key(run), run])
      .sort(([a, runA], [b, runB]) => known(b) - known(a) || down * (typeof a === "string" ? a.localeCompare(b) : a - b) || runA.name.localeCompare(runB.name))
      .map(([, run]) => run);
  }

  show() {
    const listed = this.#listed();
    const shown = listed.slice(0, this.limit);
    const rows = shown.map((run) => this.#row(run));
    for (const [i, row] of rows.entries()) if (this.body.children[i] !== row) this.body.insertBefore(row, this.body.children[i] ?? null);
    while (this.body.children.length > rows.length) this.body.lastChild.remove();
    const left = listed.length - shown.length;
    this.more.hidden = left === 0;
    setText(this.more, `Show more (${count(left)} left)`);
    const all = this.runs.size;
    setText(byId("runs-count"), all === 0 ? "No runs yet. They appear here when training begins." : listed.length < all ? `${count(listed.length)} of ${count(all)} runs` : `${count(all)} run${all === 1 ? "" : "s"}`);
  }

  #row(run) {
    let row = this.rows.get(run.name);
    if (!row) {
      const check = el("input", { type: "checkbox", "aria-label": `Draw ${run.name}`, onchange: () => this.draw(run.name, check.checked) });
      const cells = COLUMNS.map(([, , , kind]) => el(kind === "name" ? "th" : "td", { className: kind, scope: kind === "name" ? "row" : null }));
      const swatch = el("i", { className: "swatch" });
      cells[1].append(el("span", {}));
      cells[0].append(el("a", { href: `#run=${encodeURIComponent(run.name)}` }, run.name), el("small", {}));
      cells[2].append(el("span", {}), el("progress", { max: 1, "aria-label": `Progress of ${run.name}` }));
      const node = el("tr", {}, el("td", { className: "check-cell" }, check, swatch), ...cells);
      row = { node, check, cells, swatch };
      this.rows.set(run.name, row);
    }
    if (row.run !== run) {
      row.run = run;
      for (const [i, [, text]] of COLUMNS.entries()) if (i > 2) setText(row.cells[i], text(run));
      setText(row.cells[1].firstChild, run.status);
      row.cells[1].title = STATES.includes(run.status) ? "" : run.status; // a sentence about what is wrong may be cut
      setText(row.cells[0].lastChild, run.status); // on a narrow screen, where the column is hidden
      row.cells[1].dataset.state = STATES.includes(run.status) ? run.status : "wrong";
      setText(row.cells[2].firstChild, COLUMNS[2][1](run));
      row.cells[2].lastChild.hidden = !run.steps;
      row.cells[2].lastChild.value = run.steps ? (run.step ?? 0) / run.steps : 0;
    }
    const color = this.colors.get(run.name);
    row.check.checked = color !== undefined;
    row.swatch.style.background = color ? `var(${color})` : "";
    return row.node;
  }

  remove(name) {
    this.runs.delete(name);
    this.rows.delete(name);
  }
}
