// Distances and regions of interest that somebody draws in a plane. Runs after pane.js and before input.js, in the viewer's scope.
//
// A measure is {kind, pane, number, points}: the slice it lies in, and two points [column, row] of it in voxels, whole at their edges: the ends of
// a distance, or opposite corners of the box around an ellipse or a rectangle.

const KINDS = { distance: "Distance", ellipse: "Ellipse", rectangle: "Rectangle" };
const INK = "#ffe066";
let measures = [], drawn = null;  // the one that follows the crosshair

// mm², the metric of the plane: squares of steps along its columns and rows, and their product.
function planeMetric(pane) {
  const { columns, rows } = pane;
  return [scan.metric[columns][columns], scan.metric[rows][rows], scan.metric[columns][rows]];
}

function sides({ points: [[x, y], [u, v]] }) { return [u - x, v - y]; }

function lengthOf(measure) {
  const [across, down] = sides(measure), [xx, yy, xy] = planeMetric(measure.pane);
  return Math.sqrt(across * across * xx + down * down * yy + 2 * across * down * xy);
}

function areaOf(measure) {
  const [across, down] = sides(measure), [xx, yy, xy] = planeMetric(measure.pane);
  return Math.abs(across * down) * Math.sqrt(xx * yy - xy * xy) * (measure.kind === "ellipse" ? Math.PI / 4 : 1);
}

// Of the voxels whose middles lie inside: how many, mean, standard deviation (of all of them), least and greatest value.
function statistics(measure) {
  const { pane, points: [[x, y], [u, v]] } = measure, width = scan.shape[pane.columns], height = scan.shape[pane.rows];
  const values = section(pane.cut, measure.number), found = [];
  const middle = [(x + u) / 2, (y + v) / 2], half = [Math.abs(u - x) / 2, Math.abs(v - y) / 2];
  for (let row = Math.max(0, Math.floor(Math.min(y, v))); row < Math.min(height, Math.max(y, v)); row++) {
    for (let column = Math.max(0, Math.floor(Math.min(x, u))); column < Math.min(width, Math.max(x, u)); column++) {
      const [right, down] = [(column + 0.5 - middle[0]) / half[0], (row + 0.5 - middle[1]) / half[1]];
      const inside = measure.kind === "ellipse" ? right * right + down * down <= 1 : Math.abs(right) <= 1 && Math.abs(down) <= 1;
      if (inside) found.push(actual(values[row * width + column]));
    }
  }
  const mean = found.reduce((sum, value) => sum + value, 0) / found.length;
  const deviation = Math.sqrt(found.reduce((sum, value) => sum + (value - mean) ** 2, 0) / found.length);
  const [least, most] = found.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  return { count: found.length, mean, deviation, least, most };
}

// What it measures: [in a few words for the picture, in full for the list].
function told(measure) {
  if (measure.kind === "distance") {
    const words = `${lengthOf(measure).toFixed(1)} ${scan.millimetres ? "mm" : "voxels"}`;
    return [words, words];
  }
  const { count, mean, deviation, least, most } = statistics(measure), size = scan.millimetres ? `${areaOf(measure).toFixed(1)} mm², ` : "";
  if (!count) return ["no voxel", `${size}no voxel's middle lies inside`];
  const full = `mean ${figure(mean, 1)}, SD ${figure(deviation, 1)}, min ${figure(least)}, max ${figure(most)} ${scan.unit}`.trim();
  return [`${figure(mean, 1)} ± ${figure(deviation, 1)} ${scan.unit}`.trim(), `${full}; ${size}${count} voxels`];
}

function begin(kind, pane, point) {
  const measure = { kind, pane, number: at[pane.cut], points: [point, [...point]] };
  measures.push(measure);
  return measure;
}

function discard(measure) {
  measures = measures.filter((other) => other !== measure);
  if (drawn === measure) drawn = null;
  listMeasures();
  refresh();
}

// With the keyboard: the first press starts at the crosshair, which then leads the other end, the second ends there.
function drawWithKeys(kind, pane) {
  if (drawn) return finish();
  drawn = begin(kind, pane, crosshair(pane));
  listMeasures();
  refresh();
}

function finish() {
  const measure = drawn;
  lead();  // a quick hand is ahead of the drawing
  drawn = null;
  if (!sides(measure).some(Boolean)) discard(measure);
}

// The open end goes where the crosshair is, as long as that stays in the slice.
function lead() {
  if (at[drawn.pane.cut] !== drawn.number) return false;
  drawn.points[1] = crosshair(drawn.pane);
  listMeasures();
  return true;
}

function crosshair(pane) { return [at[pane.columns] + 0.5, at[pane.rows] + 0.5]; }

// Before each drawing; leaving the slice ends what is drawn there.
function followCrosshair() { if (drawn && !lead()) finish(); }

// The measure of this slice, and which of its points, lies under a place of the canvas; null where none does.
function grab(pane, place, reach) {
  for (const measure of [...measures].reverse()) {
    if (measure.pane !== pane || measure.number !== at[pane.cut]) continue;
    const index = measure.points.findIndex((point) => Math.hypot(...pane.onCanvas(point).map((value, axis) => value - place[axis])) <= reach);
    if (index >= 0) return [measure, index];
  }
  return null;
}

function drawMeasures(context, pane, density) {
  measures.forEach((measure, index) => {
    if (measure.pane !== pane || measure.number !== at[pane.cut]) return;
    const [[x, y], [u, v]] = measure.points.map((point) => pane.onCanvas(point));
    [context.strokeStyle, context.fillStyle, context.lineWidth] = [INK, INK, 1.5 * density];
    [context.shadowColor, context.shadowBlur] = ["#000", 3 * density];
    context.beginPath();
    if (measure.kind === "distance") { context.moveTo(x, y); context.lineTo(u, v); }
    if (measure.kind === "ellipse") context.ellipse((x + u) / 2, (y + v) / 2, Math.abs(u - x) / 2, Math.abs(v - y) / 2, 0, 0, 2 * Math.PI);
    if (measure.kind === "rectangle") context.rect(x, y, u - x, v - y);
    context.stroke();
    for (const [px, py] of [[x, y], [u, v]]) { context.beginPath(); context.arc(px, py, 3 * density, 0, 2 * Math.PI); context.fill(); }
    context.font = `${12 * density}px ui-monospace, monospace`;
    const words = `${index + 1}: ${told(measure)[0]}`, room = pane.canvas.width - context.measureText(words).width - 6 * density;
    context.textAlign = "left";
    [context.strokeStyle, context.shadowBlur] = ["#000", 0];
    const place = [clamp(Math.max(x, u) + 6 * density, 0, room), clamp(Math.max(y, v) + 4 * density, 14 * density, pane.canvas.height - 24 * density)];
    context.strokeText(words, ...place);
    context.fillText(words, ...place);
  });
}

// The same in words below the picture: each leads to its slice, and can be removed.
function listMeasures() {
  find(".measures").replaceChildren(...measures.map((measure, index) => {
    const item = make("li", ""), { pane, number } = measure, shown = slab.mode && measure.kind !== "distance" ? `${slab.mode}, ` : "";
    const words = `${index + 1}: ${KINDS[measure.kind]}, ${shown}${scan.names[pane.name]} ${number + 1}: ${told(measure)[1]}`;
    item.append(
      button(words, "go", () => { at[pane.cut] = number; refresh(); }, "Go to this slice"),
      button("×", "remove", () => discard(measure), "Remove this measurement (key Delete removes the last)"),
    );
    item.lastChild.setAttribute("aria-label", `Remove measurement ${index + 1}`);
    return item;
  }));
}
