// Curves as data: what the server sent, made safe to draw, smoothed, and set on one axis.

/** A series as {x, y, omitted}: x strictly increases, y is null where it is not finite. On log axes values of 0 and below have no place: they are counted in `omitted`. */
export function drawable(series, logX, logY) {
  const x = [];
  const y = [];
  let omitted = 0;
  for (let i = 0; i < (series?.x.length ?? 0); i += 1) {
    const at = series.x[i];
    const value = Number.isFinite(series.y[i]) ? series.y[i] : null;
    if (!Number.isFinite(at)) continue;
    if ((logX && at <= 0) || (logY && value !== null && value <= 0)) {
      omitted += 1;
      continue;
    }
    while (x.length && x.at(-1) >= at) {
      x.pop(); // steps that were done again after a resume: the later values count, and no line goes back
      y.pop();
    }
    x.push(at);
    y.push(value);
  }
  return { x, y, omitted };
}

/** An exponential moving average of weight 0 to 1, without the pull to zero of its first values. */
export function smoothed({ x, y }, weight) {
  let average = 0;
  let mass = 0;
  return {
    x,
    y: y.map((value) => {
      if (value === null) return null;
      average = weight * average + (1 - weight) * value;
      mass = weight * mass + 1 - weight;
      return average / mass;
    }),
  };
}

/** uPlot's table of several curves: one x, and for each curve a column with undefined where another curve has a point and this one has none. */
export function table(curves) {
  if (!curves.some((curve) => curve.x.length)) return [[], ...curves.map(() => [])];
  return uPlot.join(curves.map((curve) => [curve.x, curve.y]));
}
