// Slabs, cine, full screen, and slices for the report. Runs after input.js and before viewer.js, in the viewer's scope.

const MODES = ["", "MIP", "MinIP", "Mean"];
let playing = null;

function setSlab(mode, thickness) {
  Object.assign(slab, { mode, thickness });
  find(".slab select").value = mode;
  find(".slab input").value = thickness;
  find(".slab input").disabled = !mode;
  if (scan) listMeasures();
  refresh();
}
function nextSlab() { setSlab(MODES[(MODES.indexOf(slab.mode) + 1) % MODES.length], slab.thickness); }

// Runs through the slices of the plane that was used last, again from the first after the last.
function play() {
  if (playing) return pause();
  const pane = panes[active], rate = clamp(find(".rate").valueAsNumber || 10, 1, 60);
  playing = setInterval(() => pane.step(at[pane.cut] + 1 < scan.shape[pane.cut] ? 1 : -at[pane.cut]), 1000 / rate);
  showPlaying();
}

function pause() {
  clearInterval(playing);
  playing = null;
  showPlaying();
}

function showPlaying() {
  const control = find('[data-do="play"]');
  control.textContent = playing ? "Pause" : "Play";
  control.setAttribute("aria-pressed", Boolean(playing));
}

function fullScreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else find(".workstation").requestFullscreen().catch((error) => say(`The browser does not show the viewer in full screen: ${error.message}.`, "error"));
}

// events.py's `add_key_image` takes the slice. Where that fails it says so above the viewer.
function addToReport() {
  const pane = panes[active], alone = slab.mode ? " It shows the slice alone, without the slab." : "";
  workstation.added = (label) => {
    workstation.added = () => {};
    say(`Added to the report: ${label}.${alone}`);
    setTimeout(() => say(""), 3000);
  };
  trigger("select", { value: { plane: pane.name, index: at[pane.cut], window: [low, high] } });
}

find(".slab select").addEventListener("change", (event) => setSlab(event.target.value, slab.thickness));
find(".slab input").addEventListener("change", (event) => {
  const thickness = event.target.valueAsNumber;
  setSlab(slab.mode, thickness > 0 ? Math.min(thickness, 1000) : slab.thickness);
});
find(".rate").addEventListener("change", () => { if (playing) { pause(); play(); } });
