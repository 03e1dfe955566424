// One of the viewer's planes: its canvas, and what is drawn on it. Runs before viewer.js, in its scope.

const PLANES = { axial: [0, 1, 2], coronal: [1, 0, 2], sagittal: [2, 0, 1] };  // cut axis, axis of the rows, axis of the columns
const COLOURS = ["#f2b84b", "#6fd08c", "#6cb6ff"];  // of the lines that show where the axial, coronal and sagittal slice lie
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

class Pane {
  constructor(name) {
    [this.cut, this.rows, this.columns] = PLANES[name];
    this.name = name;
    this.box = find(`[data-plane="${name}"]`);
    this.canvas = this.box.querySelector("canvas");
    this.slider = this.box.querySelector("input");
    this.slice = document.createElement("canvas");
    this.heat = document.createElement("canvas");
    this.pointer = null;  // the voxel under the mouse, as [column, row]
    this.home();
    this.listen();
  }

  home() { this.zoom = 1; this.shift = [0, 0]; }

  text(place, words) { this.box.querySelector(`.${place}`).textContent = words; }

  open() {
    const [height, width] = [scan.shape[this.rows], scan.shape[this.columns]];
    [this.slice.width, this.slice.height] = [width, height];
    this.image = new ImageData(width, height);
    this.pointer = null;
    this.home();
    this.slider.max = scan.shape[this.cut] - 1;
    this.text("name", scan.names[this.name]);
    const edges = scan.edges[this.name] || "";
    ["top", "bottom", "left", "right"].forEach((place, index) => this.text(place, edges[index] || ""));
  }

  // Where the picture lies on the canvas: left and top edge, and pixels a voxel along columns and rows.
  place() {
    const [height, width] = [scan.shape[this.rows] * scan.spacing[this.rows], scan.shape[this.columns] * scan.spacing[this.columns]];
    const pixels = this.zoom * Math.min(this.canvas.width / width, this.canvas.height / height);  // pixels a mm
    return {
      pixels,
      left: this.canvas.width / 2 - pixels * width / 2 + this.shift[0], top: this.canvas.height / 2 - pixels * height / 2 + this.shift[1],
      across: pixels * scan.spacing[this.columns], down: pixels * scan.spacing[this.rows],
    };
  }

  // [column, row] of a mouse event: whole numbers at the voxels' edges, also beyond the picture.
  voxel(event) {
    const density = window.devicePixelRatio || 1, { left, top, across, down } = this.place(), area = this.canvas.getBoundingClientRect();
    return [((event.clientX - area.left) * density - left) / across, ((event.clientY - area.top) * density - top) / down];
  }

  // The place of [column, row] on the canvas.
  onCanvas([column, row]) {
    const { left, top, across, down } = this.place();
    return [left + column * across, top + row * down];
  }

  inside([column, row]) {
    return column >= 0 && row >= 0 && column < scan.shape[this.columns] && row < scan.shape[this.rows];
  }

  draw() {
    const density = window.devicePixelRatio || 1, { clientWidth, clientHeight } = this.canvas;
    const [width, height] = [Math.round(clientWidth * density), Math.round(clientHeight * density)];
    if (!width || !height) return;
    if (this.canvas.width !== width || this.canvas.height !== height) [this.canvas.width, this.canvas.height] = [width, height];
    const context = this.canvas.getContext("2d"), { pixels, left, top, across, down } = this.place();
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    this.cutSlice();
    const area = [left, top, across * this.slice.width, down * this.slice.height];
    context.imageSmoothingEnabled = Math.max(across, down) < 12;
    context.drawImage(this.slice, ...area);
    if (heat && this.cutHeat()) this.drawHeat(context, left, top, across, down);
    if (marks) this.drawMarks(context, left, top, across, down, density);
    drawContours(context, this, density);
    drawMeasures(context, this, density);
    this.drawScale(context, pixels, width, height, density);
    const number = at[this.cut], millimetres = scan.millimetres ? `  ·  ${(number * scan.spacing[this.cut]).toFixed(1)} mm` : "";
    this.text("number", `${number + 1} / ${scan.shape[this.cut]}`);
    this.text("mm", clientWidth < 330 ? "" : millimetres);
    this.slider.value = number;
    this.box.setAttribute("aria-valuenow", number + 1);
    this.box.setAttribute("aria-valuemax", scan.shape[this.cut]);
    this.box.setAttribute("aria-valuetext", `${scan.names[this.name]} ${number + 1} / ${scan.shape[this.cut]}${millimetres}`);
    this.readOut();
  }

  // The value under the mouse, or in the axial plane, where there is none, under the crosshair.
  readOut() {
    const place = this.pointer || (this.name === "axial" && !anyPointer() ? [at[this.columns], at[this.rows]] : null);
    const shown = slab.mode ? `${slab.mode} ` : "";
    this.text("value", place ? `${shown}${figure(valueAt(this, place), slab.mode === "Mean" ? 1 : 0)} ${scan.unit}`.trim() : "");
  }

  cutSlice() {
    const pixels = new Uint32Array(this.image.data.buffer), values = section(this.cut, at[this.cut]);
    for (let index = 0; index < values.length; index++) pixels[index] = 0xff000000 | table[Math.round(values[index]) + 32768] * 0x010101;
    this.slice.getContext("2d").putImageData(this.image, 0, 0);
  }

  // The heat of this slice on its own coarse grid, between the two nearest planes of it; false outside of it.
  cutHeat() {
    const [cut, rows, columns] = [this.cut, this.rows, this.columns], size = overlay.shape;
    const strides = [size[1] * size[2], size[2], 1];
    const exact = (at[cut] - overlay.origin[cut]) / overlay.step[cut];
    if (exact < -0.5 || exact > size[cut] - 0.5) return false;
    const before = clamp(Math.floor(exact), 0, size[cut] - 1), after = Math.min(before + 1, size[cut] - 1), part = clamp(exact - before, 0, 1);
    const image = new ImageData(size[columns], size[rows]);
    for (let y = 0, target = 0; y < size[rows]; y++) {
      for (let x = 0; x < size[columns]; x++, target += 4) {
        const place = y * strides[rows] + x * strides[columns];
        const value = (1 - part) * heat[place + before * strides[cut]] + part * heat[place + after * strides[cut]];
        image.data.set(warmth(value), target);
      }
    }
    [this.heat.width, this.heat.height] = [size[columns], size[rows]];
    this.heat.getContext("2d").putImageData(image, 0, 0);
    return true;
  }

  drawHeat(context, left, top, across, down) {
    const [rows, columns] = [this.rows, this.columns], { origin, step } = overlay;
    const x = left + across * (origin[columns] - step[columns] / 2 + 0.5), y = top + down * (origin[rows] - step[rows] / 2 + 0.5);
    context.imageSmoothingEnabled = true;
    context.globalAlpha = opacity;
    context.drawImage(this.heat, x, y, across * step[columns] * this.heat.width, down * step[rows] * this.heat.height);
    context.globalAlpha = 1;
  }

  drawMarks(context, left, top, across, down, density) {
    const x = left + (at[this.columns] + 0.5) * across, y = top + (at[this.rows] + 0.5) * down, gap = 12 * density;
    context.lineWidth = density;
    for (const [axis, from, to] of [
      [this.columns, [x, 0], [x, y - gap]], [this.columns, [x, y + gap], [x, this.canvas.height]],
      [this.rows, [0, y], [x - gap, y]], [this.rows, [x + gap, y], [this.canvas.width, y]],
    ]) {
      context.strokeStyle = `${COLOURS[axis]}b0`;
      context.beginPath();
      context.moveTo(...from.map((value) => Math.round(value) + 0.5));
      context.lineTo(...to.map((value) => Math.round(value) + 0.5));
      context.stroke();
    }
  }

  drawScale(context, pixels, width, height, density) {
    if (!scan.millimetres) return;
    const length = [200, 100, 50, 20, 10, 5, 2, 1].find((mm) => mm * pixels < width / 3) || 1;
    const right = width - 12 * density, y = height - 8 * density, x = right - length * pixels;
    [context.shadowColor, context.shadowBlur] = ["#000", 4 * density];
    context.strokeStyle = "#cbd5e1";
    context.lineWidth = density;
    context.beginPath();
    context.moveTo(x, y - 4 * density); context.lineTo(x, y); context.lineTo(right, y); context.lineTo(right, y - 4 * density);
    context.stroke();
    context.fillStyle = "#cbd5e1";
    context.font = `${11 * density}px ui-monospace, monospace`;
    context.textAlign = "right";
    context.fillText(`${length} mm`, right, y - 7 * density);
    context.shadowBlur = 0;
  }

  step(slices) {
    at[this.cut] = clamp(at[this.cut] + slices, 0, scan.shape[this.cut] - 1);
    refresh();
  }

  // Moves the crosshair within the plane.
  move(columns, rows) {
    at[this.columns] = clamp(at[this.columns] + columns, 0, scan.shape[this.columns] - 1);
    at[this.rows] = clamp(at[this.rows] + rows, 0, scan.shape[this.rows] - 1);
    refresh();
  }

  // Larger or smaller, with the voxel [column, row] where it is: that under the mouse, or under the crosshair.
  scale(factor, still = this.pointer || [at[this.columns] + 0.5, at[this.rows] + 0.5]) {
    const old = this.place();
    this.zoom = clamp(this.zoom * factor, 0.5, 40);
    const now = this.place();
    this.shift[0] += old.left + still[0] * old.across - now.left - still[0] * now.across;
    this.shift[1] += old.top + still[1] * old.down - now.top - still[1] * now.down;
    if (this.zoom <= 1) this.shift = [0, 0];
    refresh();
  }
}

// From transparent over red to yellow, by a heat of 0 to 255.
function warmth(value) {
  const part = value / 255;
  return [255, Math.round(255 * clamp(2 * part - 0.7, 0, 1)), Math.round(90 * clamp(3 * part - 2, 0, 1)), Math.round(255 * clamp(1.4 * part - 0.15, 0, 1))];
}
