// What mouse, finger and keys do in a plane. Runs after pane.js and before viewer.js, in its scope.

Pane.prototype.listen = function listen() {
  let held = null, wheel = 0, dragged = null;  // the measure whose end is being moved, and which end
  const within = ([column, row]) => [clamp(column, 0, scan.shape[this.columns]), clamp(row, 0, scan.shape[this.rows])];
  this.canvas.addEventListener("pointerdown", (event) => {
    if (!scan) return;
    held = event.button === 2 || event.shiftKey ? "window" : event.button === 1 || event.ctrlKey ? "pan" : tool;
    this.canvas.setPointerCapture(event.pointerId);
    this.box.focus({ preventScroll: true });
    event.preventDefault();
    take(this);
    pause();
    if (held === "cross") this.point(event);
    if (held in KINDS) {
      const place = this.voxel(event);
      dragged = grab(this, this.onCanvas(place), 9 * (window.devicePixelRatio || 1));
      if (!dragged && this.inside(place)) dragged = [begin(held, this, place), 1];
    }
  });
  this.canvas.addEventListener("pointermove", (event) => {
    if (!scan) return;
    const density = window.devicePixelRatio || 1, place = this.voxel(event);
    this.pointer = event.pointerType !== "touch" && this.inside(place) ? place : null;
    if (held === "cross") return this.point(event);
    if (held === "pan") { this.shift[0] += event.movementX * density; this.shift[1] += event.movementY * density; }
    if (dragged) { dragged[0].points[dragged[1]] = within(place); listMeasures(); }
    if (held === "window") return dragWindow(event.movementX, event.movementY);
    if (held) refresh(); else readAll();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    this.canvas.addEventListener(end, () => {
      if (dragged && !sides(dragged[0]).some((voxels) => Math.abs(voxels) > 1e-3)) discard(dragged[0]);  // a click that drew nothing
      [held, dragged] = [null, null];
    });
  }
  this.canvas.addEventListener("pointerleave", () => { this.pointer = null; readAll(); });
  this.canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  this.canvas.addEventListener("wheel", (event) => {
    if (!scan) return;
    event.preventDefault();
    if (event.ctrlKey) return this.scale(event.deltaY < 0 ? 1.15 : 1 / 1.15, this.voxel(event));
    wheel += event.deltaMode ? event.deltaY * 30 : event.deltaY;  // a notch is about 100, a finger's stroke many small ones
    const slices = Math.abs(event.deltaY) >= 50 || event.deltaMode ? Math.sign(event.deltaY) : Math.trunc(wheel / 25);
    if (slices) { wheel = 0; pause(); this.step(slices); }
  }, { passive: false });
  this.canvas.addEventListener("dblclick", () => enlarge(this.name));
  this.box.addEventListener("focus", () => take(this));
  this.slider.addEventListener("input", () => { pause(); at[this.cut] = Number(this.slider.value); refresh(); });
  this.box.addEventListener("keydown", (event) => {
    if (!scan || event.target === this.slider || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = this.keys(event.shiftKey)[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act) { event.preventDefault(); act(); }
  });
};

// The plane that was used last: what plays, and what goes into the report.
let active = "axial";
function take(pane) { active = pane.name; }

// What each key does; with Shift the arrows move the crosshair within the plane.
Pane.prototype.keys = function keys(shift) {
  const [back, on] = [() => { pause(); this.step(-1); }, () => { pause(); this.step(1); }];
  const arrows = shift
    ? { ArrowUp: () => this.move(0, -1), ArrowDown: () => this.move(0, 1), ArrowLeft: () => this.move(-1, 0), ArrowRight: () => this.move(1, 0) }
    : { ArrowUp: back, ArrowDown: on, ArrowLeft: back, ArrowRight: on };
  const presets = scan.presets.slice(0, 9).map(([, from, to], index) => [index + 1, () => setWindow(from, to)]);
  return {
    ...arrows, ...Object.fromEntries(presets),
    PageUp: () => this.step(-10), PageDown: () => this.step(10), Home: () => this.step(-1e9), End: () => this.step(1e9),
    "+": () => this.scale(1.25), "=": () => this.scale(1.25), "-": () => this.scale(0.8),
    Enter: () => (drawn ? finish() : enlarge(this.name)), Escape: drawn ? () => discard(drawn) : undefined,
    d: () => drawWithKeys("distance", this), e: () => drawWithKeys("ellipse", this), b: () => drawWithKeys("rectangle", this),
    Delete: () => discard(measures.at(-1)), Backspace: () => discard(measures.at(-1)),
    p: play, f: fullScreen, m: nextSlab, k: addToReport, v: showAll, n: nextMask, 0: reset, r: reset, c: () => { marks = !marks; refresh(); },
  };
};

// Moves the crosshair to the mouse.
Pane.prototype.point = function point(event) {
  const [column, row] = this.voxel(event);
  at[this.columns] = clamp(Math.floor(column), 0, scan.shape[this.columns] - 1);
  at[this.rows] = clamp(Math.floor(row), 0, scan.shape[this.rows] - 1);
  refresh();
};

function readAll() { for (const pane of Object.values(panes)) pane.readOut(); }
function anyPointer() { return Object.values(panes).some((pane) => pane.pointer); }
