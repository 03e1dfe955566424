// One of the viewer's planes: its canvas, what is drawn on it, and what mouse, finger and keys do there. Runs before viewer.js, in its scope.

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
    this.home();
    this.listen();
  }

  home() { this.zoom = 1; this.shift = [0, 0]; }

  text(place, words) { this.box.querySelector(`.${place}`).textContent = words; }

  open() {
    const [height, width] = [scan.shape[this.rows], scan.shape[this.columns]];
    [this.slice.width, this.slice.height] = [width, height];
    this.image = new ImageData(width, height);
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
    this.drawScale(context, pixels, width, height, density);
    const number = at[this.cut], millimetres = (number * scan.spacing[this.cut]).toFixed(1);
    const count = `${number + 1} / ${scan.shape[this.cut]}`;
    this.text("count", scan.millimetres ? `${count}  ·  ${millimetres} mm` : count);
    this.slider.value = number;
    this.box.setAttribute("aria-valuenow", number + 1);
    this.box.setAttribute("aria-valuemax", scan.shape[this.cut]);
    this.box.setAttribute("aria-valuetext", `${scan.names[this.name]} ${this.box.querySelector(".count").textContent}`);
  }

  cutSlice() {
    const strides = [scan.shape[1] * scan.shape[2], scan.shape[2], 1];
    const pixels = new Uint32Array(this.image.data.buffer), [down, across] = [strides[this.rows], strides[this.columns]];
    let row = at[this.cut] * strides[this.cut], target = 0;
    for (let y = 0; y < this.image.height; y++, row += down) {
      for (let x = 0, place = row; x < this.image.width; x++, place += across) {
        pixels[target++] = 0xff000000 | table[voxels[place] + 32768] * 0x010101;
      }
    }
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

  // Moves the crosshair to a point of the canvas in CSS pixels.
  point(event) {
    const density = window.devicePixelRatio || 1, { left, top, across, down } = this.place(), area = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - area.left) * density - left) / across, y = ((event.clientY - area.top) * density - top) / down;
    at[this.columns] = clamp(Math.floor(x), 0, scan.shape[this.columns] - 1);
    at[this.rows] = clamp(Math.floor(y), 0, scan.shape[this.rows] - 1);
    refresh();
  }

  step(slices) {
    at[this.cut] = clamp(at[this.cut] + slices, 0, scan.shape[this.cut] - 1);
    refresh();
  }

  scale(factor) {
    this.zoom = clamp(this.zoom * factor, 0.5, 20);
    if (this.zoom <= 1) this.shift = [0, 0];
    refresh();
  }

  listen() {
    let held = null, wheel = 0;
    this.canvas.addEventListener("pointerdown", (event) => {
      if (!scan) return;
      held = event.button === 2 || event.shiftKey ? "window" : event.button === 1 || event.ctrlKey ? "pan" : tool;
      this.canvas.setPointerCapture(event.pointerId);
      this.box.focus({ preventScroll: true });
      event.preventDefault();
      if (held === "cross") this.point(event);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!held || !scan) return;
      const density = window.devicePixelRatio || 1;
      if (held === "cross") this.point(event);
      if (held === "pan") { this.shift[0] += event.movementX * density; this.shift[1] += event.movementY * density; refresh(); }
      if (held === "window") dragWindow(event.movementX, event.movementY);
    });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => { held = null; });
    this.canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    this.canvas.addEventListener("wheel", (event) => {
      if (!scan) return;
      event.preventDefault();
      if (event.ctrlKey) return this.scale(event.deltaY < 0 ? 1.15 : 1 / 1.15);
      wheel += event.deltaMode ? event.deltaY * 30 : event.deltaY;  // a notch is about 100, a finger's stroke many small ones
      const slices = Math.abs(event.deltaY) >= 50 || event.deltaMode ? Math.sign(event.deltaY) : Math.trunc(wheel / 25);
      if (slices) { wheel = 0; this.step(slices); }
    }, { passive: false });
    this.canvas.addEventListener("dblclick", () => enlarge(this.name));
    this.slider.addEventListener("input", () => { at[this.cut] = Number(this.slider.value); refresh(); });
    this.box.addEventListener("keydown", (event) => {
      if (!scan || event.target === this.slider || event.ctrlKey || event.metaKey || event.altKey) return;
      const act = {
        ArrowUp: () => this.step(-1), ArrowDown: () => this.step(1), ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1),
        PageUp: () => this.step(-10), PageDown: () => this.step(10), Home: () => this.step(-1e9), End: () => this.step(1e9),
        "+": () => this.scale(1.25), "=": () => this.scale(1.25), "-": () => this.scale(0.8), Enter: () => enlarge(this.name),
        0: reset, r: reset, c: () => { marks = !marks; refresh(); },
      }[event.key] || (scan.presets[Number(event.key) - 1] && (() => setWindow(...scan.presets[Number(event.key) - 1].slice(1))));
      if (act) { event.preventDefault(); act(); }
    });
  }
}

// From transparent over red to yellow, by a heat of 0 to 255.
function warmth(value) {
  const part = value / 255;
  return [255, Math.round(255 * clamp(2 * part - 0.7, 0, 1)), Math.round(90 * clamp(3 * part - 2, 0, 1)), Math.round(255 * clamp(1.4 * part - 0.15, 0, 1))];
}
