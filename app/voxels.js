// What the volume holds: slices of it, values of voxels, and how a value is written. Runs before viewer.js, in its scope.

// The stored values of a slice, row after row.
function section(cut, number) {
  const [, rows, columns] = Object.values(PLANES).find((axes) => axes[0] === cut);
  const strides = [scan.shape[1] * scan.shape[2], scan.shape[2], 1], [height, width] = [scan.shape[rows], scan.shape[columns]];
  if (cut === 0) return voxels.subarray(number * strides[0], (number + 1) * strides[0]);
  const values = new Int16Array(height * width);
  for (let y = 0, target = 0; y < height; y++) {
    for (let x = 0, place = number * strides[cut] + y * strides[rows]; x < width; x++, place += strides[columns]) values[target++] = voxels[place];
  }
  return values;
}

// The value that a pane shows at [column, row].
function valueAt(pane, [column, row]) {
  const values = section(pane.cut, at[pane.cut]);
  return scan.slope * values[Math.floor(row) * scan.shape[pane.columns] + Math.floor(column)] + scan.intercept;
}

// A value with the digits that it has: whole numbers whole, fractions to the step in which the browser got them; `more` digits beyond.
function figure(value, more = 0) {
  const whole = Number.isInteger(scan.slope) && Number.isInteger(scan.intercept);
  const digits = (whole ? 0 : Math.max(0, Math.ceil(-Math.log10(scan.slope)))) + more;
  return digits > 12 ? String(Number(value.toPrecision(5))) : String(Number(value.toFixed(digits)));
}
