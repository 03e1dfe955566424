// What the volume holds: slices and slabs of it, and how a value is written. Runs before pane.js, in the viewer's scope.

// A slab shows, of several slices around the one, the greatest, the least or the mean value of each voxel; thickness in mm, slices where mm are unknown.
const slab = { mode: "", thickness: 10 };
const sections = [];  // the last one of each cut axis

// First and last slice that are shown together; the one itself stands in the middle, or before it where their number is even.
function slabOf(cut, number) {
  const count = slab.mode ? Math.max(1, Math.round(slab.thickness / scan.spacing[cut])) : 1, first = number - Math.floor((count - 1) / 2);
  return [Math.max(first, 0), Math.min(first + count, scan.shape[cut]) - 1];
}

// The stored values of a slice or slab, row after row.
function section(cut, number) {
  const [first, last] = slabOf(cut, number), key = `${scan.url} ${slab.mode} ${first} ${last}`;
  if (sections[cut]?.key !== key) sections[cut] = { key, values: project(cut, first, last) };
  return sections[cut].values;
}

function project(cut, first, last) {
  const values = cutOut(cut, first), count = last - first + 1;
  if (count === 1) return values;
  const result = slab.mode === "Mean" ? Float32Array.from(values) : values.slice();
  for (let number = first + 1; number <= last; number++) {
    const more = cutOut(cut, number);
    if (slab.mode === "MIP") for (let index = 0; index < more.length; index++) { if (more[index] > result[index]) result[index] = more[index]; }
    if (slab.mode === "MinIP") for (let index = 0; index < more.length; index++) { if (more[index] < result[index]) result[index] = more[index]; }
    if (slab.mode === "Mean") for (let index = 0; index < more.length; index++) result[index] += more[index];
  }
  return slab.mode === "Mean" ? result.map((sum) => sum / count) : result;
}

function cutOut(cut, number) {
  const [, rows, columns] = Object.values(PLANES)[cut];
  const strides = [scan.shape[1] * scan.shape[2], scan.shape[2], 1], [height, width] = [scan.shape[rows], scan.shape[columns]];
  if (cut === 0) return voxels.subarray(number * strides[0], (number + 1) * strides[0]);
  const values = new Int16Array(height * width);
  for (let y = 0, target = 0; y < height; y++) {
    for (let x = 0, place = number * strides[cut] + y * strides[rows]; x < width; x++, place += strides[columns]) values[target++] = voxels[place];
  }
  return values;
}

const actual = (stored) => scan.slope * stored + scan.intercept;

// The value that a plane shows at [column, row].
function valueAt(pane, [column, row]) {
  return actual(section(pane.cut, at[pane.cut])[Math.floor(row) * scan.shape[pane.columns] + Math.floor(column)]);
}

// A value with the digits that it has: whole numbers whole, fractions to the step in which the browser got them; `more` digits beyond.
function figure(value, more = 0) {
  const whole = Number.isInteger(scan.slope) && Number.isInteger(scan.intercept);
  const digits = (whole ? 0 : Math.max(0, Math.ceil(-Math.log10(scan.slope)))) + more;
  return digits > 12 ? String(Number(value.toPrecision(5))) : String(Number(value.toFixed(digits)));
}
