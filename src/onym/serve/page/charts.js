// The charts. Each shows one figure of the runs that are drawn, over the same x; each can be read as a table.
import { el, setText } from "./elements.js";
import { compact, duration, value } from "./format.js";
import { drawable, smoothed, table } from "./series.js";

const ROWS_IN_TABLE = 500;
const EVENTS_DRAWN = 100;
const TIME_STEPS = [1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 604800]; // seconds between two ticks
const X_NAMES = { step: "step", tokens: "tokens", seconds: "time" };

// raw: thin and faint, with the smoothed curve over it; points: few values, each marked.
const CHARTS = [
  { title: "Loss", logY: true, events: true, curves: [{ key: "train_loss", name: "training", raw: true }, { key: "val_loss", name: "held-out", points: true }, { key: "ema_val_loss", name: "held-out, averaged weights", points: true, dash: [4, 4] }] },
  { title: "Learning rate", logY: true, curves: [{ key: "lr", name: "learning rate" }] },
  { title: "Gradient norm", logY: true, events: true, curves: [{ key: "grad_norm", name: "gradient norm", raw: true }] },
  { title: "Tokens per second", logY: false, curves: [{ key: "tokens_per_second", name: "tokens/s", raw: true }] },
];

/** A colour of the style sheet as the canvas needs it: resolved for the scheme in use. */
function resolved(variable) {
  const probe = document.body.appendChild(el("span", { hidden: true }));
  probe.style.color = `var(${variable})`;
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

const faint = (color) => color.replace(/^rgb\((.*)\)$/, "rgba($1, 0.28)");

export class Charts {
  /** `zoom(from, to)` is called when a range was dragged, zoom(null, null) on a double click. */
  constructor(root, zoom) {
    this.charts = CHARTS.map((definition) => new Chart(definition, zoom));
    root.append(...this.charts.map((chart) => chart.node));
    let width = 0;
    new ResizeObserver(() => {
      if (root.clientWidth === width) return;
      width = root.clientWidth;
      for (const chart of this.charts) chart.resize();
    }).observe(root);
  }

  /** Draws `runs` ([{name, color: "--c0", metrics}]) with `settings` ({x, logX, logY, smoothing, range}). */
  draw(runs, settings) {
    const colors = new Map(runs.map((run) => [run, resolved(run.color)]));
    const ink = { soft: resolved("--soft"), line: resolved("--line"), sheet: resolved("--sheet") };
    for (const chart of this.charts) chart.draw(runs, settings, colors, ink);
  }
}

class Chart {
  constructor(definition, zoom) {
    this.definition = definition;
    this.zoom = zoom;
    const id = `chart-${definition.title.toLowerCase().replaceAll(" ", "-")}`;
    this.plotted = el("div", { className: "plot" });
    this.marks = el("div", { className: "marks" });
    this.legend = el("p", { className: "legend" });
    this.note = el("p", { className: "hint" });
    this.table = el("div", { id: `${id}-table`, className: "scroller", hidden: true, tabIndex: 0, role: "region", "aria-label": `${definition.title}: table` });
    this.button = el("button", { type: "button", className: "quiet", "aria-expanded": "false", "aria-controls": `${id}-table`, "aria-label": `Table of ${definition.title}`, onclick: () => this.#toggleTable() }, "Table");
    this.node = el("section", { className: "chart", "aria-labelledby": id }, el("header", {}, el("h3", { id }, definition.title), this.button), this.plotted, this.legend, this.note, this.table);
  }

  draw(runs, settings, colors, ink) {
    const { definition } = this;
    this.settings = settings;
    const logY = settings.logY && definition.logY;
    this.curves = [];
    let omitted = 0;
    for (const run of runs) {
      for (const curve of definition.curves) {
        if (!run.metrics?.series[curve.key]) continue;
        const data = drawable(run.metrics.series[curve.key], settings.logX, logY);
        omitted += data.omitted;
        const label = `${run.name}, ${curve.name}`;
        const color = colors.get(run);
        if (curve.raw && settings.smoothing > 0) {
          this.curves.push({ run, curve, label, data, stroke: faint(color), width: 1, background: true });
          this.curves.push({ run, curve, label: `${label} (smoothed)`, data: smoothed(data, settings.smoothing), stroke: color, width: 1.75 });
        } else this.curves.push({ run, curve, label, data, stroke: color, width: 1.5 });
      }
    }
    this.events = definition.events ? runs.flatMap((run) => (run.metrics?.events ?? []).map((event) => ({ ...event, run }))).filter((event) => !settings.logX || event.x > 0) : [];
    this.data = table(this.curves.map((curve) => curve.data));
    setText(this.note, omitted ? `${omitted} value${omitted === 1 ? "" : "s"} of zero or below ${omitted === 1 ? "is" : "are"} left out: a log axis has no place for them.` : "");
    // While a run goes on only the data change; the plot is made anew when curves or axes did.
    const shape = JSON.stringify([this.curves.map(({ label, stroke, width }) => [label, stroke, width]), settings.x, settings.logX, logY, ink]);
    if (shape !== this.shape || !this.plot) this.#make(shape, settings, logY, ink);
    else this.plot.setData(this.data);
    this.#legend(null);
    if (!this.table.hidden) this.#fillTable();
  }

  #make(shape, settings, logY, ink) {
    this.shape = shape;
    this.plot?.destroy();
    const axis = { stroke: ink.soft, grid: { stroke: ink.line, width: 1 }, ticks: { stroke: ink.line, width: 1, size: 4 }, font: "12px system-ui, sans-serif" };
    const shortTick = (number) => (number === null ? "" : Math.abs(number) >= 1000 ? compact(number) : value(number));
    const ticks = settings.x === "seconds" ? (_, splits) => splits.map((split) => (split === null ? "" : duration(split))) : (_, splits) => splits.map(shortTick);
    const chart = this;
    this.plot = new uPlot(
      {
        ...this.#size(),
        padding: [8, 12, 0, 0],
        legend: { show: false },
        scales: {
          x: { time: false, distr: settings.logX ? 3 : 1, range: (_, low, high) => chart.#range(low, high) },
          y: { distr: logY ? 3 : 1 },
        },
        axes: [
          { ...axis, values: ticks, space: 70, size: 32, ...(settings.x === "seconds" && !settings.logX ? { incrs: TIME_STEPS } : {}) },
          { ...axis, values: (_, splits) => splits.map(shortTick), size: 64 },
        ],
        series: [
          {},
          ...this.curves.map(({ label, stroke, width, curve, background }) => ({
            label,
            stroke,
            width,
            dash: curve.dash,
            points: { show: curve.points && !background ? true : undefined, size: 5, fill: stroke },
          })),
        ],
        cursor: { drag: { x: true, y: false, setScale: false }, sync: { key: "runs", setSeries: false }, points: { size: 6 }, hover: { skip: [undefined, null] }, bind: { dblclick: () => () => chart.zoom(null, null) } },
        hooks: {
          setSelect: [
            (plot) => {
              const { left, width } = plot.select;
              if (width < 3) return;
              plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
              chart.zoom(plot.posToVal(left, "x"), plot.posToVal(left + width, "x"));
            },
          ],
          setCursor: [(plot) => chart.#legend(plot.cursor.idx === null || plot.cursor.idx === undefined ? null : plot.cursor.idxs)],
          draw: [(plot) => chart.#markEvents(plot)],
        },
      },
      this.data,
      this.plotted,
    );
    this.plot.root.setAttribute("aria-hidden", "true"); // the table is what screen readers get
    this.plot.over.append(this.marks);
  }

  /** The range that was zoomed to, or all there is; on a log axis never from 0. */
  #range(low, high) {
    const { range, logX } = this.settings;
    if (range) return [range.from, range.to];
    if (low === null) return logX ? [1, 10] : [0, 1];
    return low === high ? [low, logX ? low * 10 : low + 1] : [low, high];
  }

  #size() {
    return { width: Math.max(200, this.plotted.clientWidth), height: this.plotted.clientWidth < 480 ? 200 : 250 };
  }

  resize() {
    this.plot?.setSize(this.#size());
  }

  /** Skipped steps and rollbacks: a line each in the run's colour, with a title to point at. */
  #markEvents(plot) {
    const shown = this.events.filter((event) => event.x >= plot.scales.x.min && event.x <= plot.scales.x.max).slice(-EVENTS_DRAWN);
    this.marks.replaceChildren(
      ...shown.map((event) => {
        const mark = el("span", { title: this.#titled(event) });
        mark.style.left = `${plot.valToPos(event.x, "x")}px`;
        mark.style.color = `var(${event.run.color})`;
        return mark;
      }),
    );
  }

  #titled({ run, event, step, reason }) {
    return `${run.name}, step ${step}: ${{ "skipped-step": "step skipped", rollback: "rollback" }[event] ?? event}${reason ? `. ${reason}` : ""}`;
  }

  #x(number) {
    return this.settings.x === "seconds" ? duration(number) : value(number);
  }

  /** The newest values of each run, or those under the pointer. */
  #legend(indices) {
    const entries = new Map();
    let at = null;
    for (const [i, { curve, run, background }] of this.curves.entries()) {
      if (background) continue;
      const column = this.data[i + 1];
      const index = indices ? indices[i + 1] : column.findLastIndex((number) => number !== null && number !== undefined);
      const number = column[index];
      if (number === null || number === undefined) continue;
      at ??= this.data[0][index];
      if (!entries.has(run)) {
        const swatch = el("i", {});
        swatch.style.background = `var(${run.color})`;
        entries.set(run, el("span", {}, swatch, el("span", { className: "run", title: run.name }, run.name)));
      }
      entries.get(run).append(this.definition.curves.length > 1 ? `${curve.name} ` : "", el("b", {}, value(number)));
    }
    const where = indices && at !== null ? [el("span", {}, `${X_NAMES[this.settings.x]} `, el("b", {}, this.#x(at)))] : [];
    this.legend.replaceChildren(...where, ...entries.values());
  }

  #toggleTable() {
    this.table.hidden = !this.table.hidden;
    this.button.setAttribute("aria-expanded", String(!this.table.hidden));
    if (!this.table.hidden) this.#fillTable();
  }

  #fillTable() {
    const columns = this.curves.map((curve, i) => i).filter((i) => !this.curves[i].background);
    const xs = this.data[0];
    const rows = xs.map((_, row) => row).filter((row) => columns.some((i) => Number.isFinite(this.data[i + 1][row])));
    const every = Math.max(1, Math.ceil(rows.length / ROWS_IN_TABLE));
    const marked = columns.filter((i) => this.curves[i].curve.points); // the few values of evaluations are all shown
    const shown = rows.filter((row, i) => i % every === 0 || i === rows.length - 1 || marked.some((column) => Number.isFinite(this.data[column + 1][row])));
    const thinned = every > 1 ? ` ${shown.length} of ${rows.length} points: the CSV of a run has every row.` : "";
    const events = this.events.length ? el("ul", {}, ...this.events.map((event) => el("li", {}, this.#titled(event)))) : null;
    this.table.replaceChildren(
      el(
        "table",
        {},
        el("caption", {}, `${this.definition.title} over ${X_NAMES[this.settings.x]}.${thinned}`),
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, X_NAMES[this.settings.x]), ...columns.map((i) => el("th", { scope: "col" }, this.curves[i].label)))),
        el("tbody", {}, ...shown.map((row) => el("tr", {}, el("th", { scope: "row" }, this.#x(xs[row])), ...columns.map((i) => el("td", {}, Number.isFinite(this.data[i + 1][row]) ? value(this.data[i + 1][row]) : ""))))),
      ),
      ...(events ? [el("h4", {}, "Events"), events] : []),
    );
  }
}
