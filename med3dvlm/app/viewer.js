// The viewer: three linked planes of a volume that the browser holds, drawn on 2D canvases. No library, no network beyond this server.
//
// gr.HTML runs this file once, after the scripts that layout.py lists before it, with `element` (its root, filled by viewer.html), `props`, `trigger`
// and `watch`. `props.value` is
// {scan, overlay, masks, ...}: `scan` are the facts of viewer.py's Picture and the `url` of its bytes, `overlay` the same for a heat map, the
// rest is for masks.js.
// Display axes are z, y, x (viewer.py); `at` is the crosshair in voxels along them.

let scan = null, voxels = null, overlay = null, heat = null;
let at = [0, 0, 0], before = null, jumped = "", low = 0, high = 1, tool = "cross", opacity = 0.5, marks = true;
let table = new Uint8Array(65536);
let wanted = "", wantedHeat = "", pending = false;
const panes = {};

function refresh() {
  if (pending || !scan) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    if (!scan) return;
    followCrosshair();
    for (const pane of Object.values(panes)) pane.draw();
    element.dataset.at = at.join(",");  // for whoever drives the page
  });
}

function setWindow(from, to) {
  [low, high] = [from, Math.max(to, from + 1e-6 * Math.max(1, Math.abs(from)))];
  for (let index = 0; index < 65536; index++) {
    table[index] = clamp(Math.round(255 * (scan.slope * (index - 32768) + scan.intercept - low) / (high - low)), 0, 255);
  }
  find(".level").value = figure((low + high) / 2, 1);
  find(".width").value = figure(high - low, 1);
  for (const preset of element.querySelectorAll(".presets button")) {
    preset.setAttribute("aria-pressed", Number(preset.dataset.low) === low && Number(preset.dataset.high) === high);
  }
  refresh();
}

function dragWindow(right, down) {
  const step = (scan.window[1] - scan.window[0]) / 300, width = Math.max(high - low + 2 * right * step, 2 * step);
  const level = (low + high) / 2 - down * step;
  setWindow(level - width / 2, level + width / 2);
}

function reset() {
  for (const pane of Object.values(panes)) pane.home();
  setWindow(...scan.window);
}

function enlarge(name) {
  const stage = find(".stage");
  stage.dataset.large = stage.dataset.large === name ? "" : name;
  refresh();
}

function say(words, kind = "") {
  const sign = find(".sign");
  sign.textContent = words;
  sign.dataset.kind = kind;
  sign.hidden = !words;
}

async function fetchBytes(url, total, progress) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  const bytes = new Uint8Array(total), reader = answer.body.getReader();
  let done = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    bytes.set(part.value, done);
    done += part.value.length;
    progress(Math.round(100 * done / total));
  }
  if (done !== total) throw new Error("the connection broke off");
  return bytes.buffer;
}

async function open(facts) {
  wanted = facts.url;
  [scan, voxels, wantedHeat, before] = [null, null, "", null];  // nothing of the scan before stands beside what is said of this one
  uncover();
  clearMasks();
  pause();
  [measures, drawn] = [[], null];
  find(".workstation").dataset.state = "loading";
  say("Loading the picture");
  const count = facts.shape.reduce((product, length) => product * length, 1);
  try {
    const bytes = await fetchBytes(facts.url, 2 * count, (percent) => wanted === facts.url && say(`Loading the picture, ${percent} %`));
    if (wanted !== facts.url) return;  // another scan was opened meanwhile
    [scan, voxels] = [facts, new Int16Array(bytes)];
  } catch (error) {
    if (wanted === facts.url) { wanted = ""; find(".workstation").dataset.state = "empty"; say(`The picture could not be loaded: ${error.message}. Open the scan again.`, "error"); }
    return;
  }
  at = scan.shape.map((length) => Math.floor((length - 1) / 2));
  const presets = find(".presets");
  presets.replaceChildren(...scan.presets.map(([name, from, to], index) => {
    const preset = button(name, "", () => setWindow(from, to), `${from} to ${to} ${scan.unit} (key ${index + 1})`);
    [preset.dataset.low, preset.dataset.high] = [from, to];
    return preset;
  }));
  find(".workstation").dataset.state = "open";
  find(".note").textContent = scan.note;
  for (const pane of Object.values(panes)) pane.open();
  listMeasures();
  say("");
  setWindow(...scan.window);
}

// Takes the overlay away; the crosshair goes back to where it was, unless somebody has moved it since.
function uncover() {
  if (before && at.join() === jumped) at = before;
  before = null;
  [overlay, heat] = [null, null];
  find(".overlay").hidden = true;
  refresh();
}

async function lay(facts) {
  wantedHeat = facts ? facts.url : "";
  if (!facts) return uncover();
  find(".overlay").hidden = false;
  find(".overlay .label").textContent = facts.label;
  const count = facts.shape.reduce((product, length) => product * length, 1);
  try {
    const bytes = await fetchBytes(facts.url, count, () => {});
    if (wantedHeat !== facts.url || !scan) return;
    [overlay, heat] = [facts, new Uint8Array(bytes)];
    if (facts.peak) {
      if (!before || at.join() !== jumped) before = at;
      at = facts.peak.map((place, axis) => clamp(place, 0, scan.shape[axis] - 1));
      jumped = at.join();
    }
    refresh();
    element.scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (wantedHeat === facts.url) find(".overlay .label").textContent = `The overlay could not be loaded: ${error.message}.`;
  }
}

async function update() {
  const now = () => props.value || {};
  listSeries(now().series || [], now().scan ? now().scan.url : "");
  if (now().scan && now().scan.url !== wanted) await open(now().scan);
  const { scan: facts, overlay: heatFacts } = now();  // one may have come while the picture was loaded
  if (scan && facts && facts.url === scan.url && (heatFacts ? heatFacts.url : "") !== wantedHeat) await lay(heatFacts);
  if (scan && now().scan && now().scan.url === scan.url) await setMasks(now());
}

for (const name of Object.keys(PLANES)) panes[name] = new Pane(name);
function choose(name) {
  tool = name;
  for (const choice of element.querySelectorAll("button[data-tool]")) choice.setAttribute("aria-pressed", choice.dataset.tool === tool);
  find(".stage").dataset.drag = tool;
}
for (const choice of element.querySelectorAll("button[data-tool]")) choice.addEventListener("click", () => choose(choice.dataset.tool));
for (const [name, act] of Object.entries({ reset, hide: uncover, play, full: fullScreen, add: addToReport, closer: () => scaleAll(1.25), farther: () => scaleAll(0.8) })) {
  find(`[data-do="${name}"]`).addEventListener("click", () => scan && act());
}
function scaleAll(factor) { for (const pane of Object.values(panes)) pane.scale(factor); }
for (const field of [".level", ".width"]) {
  find(field).addEventListener("change", () => {
    const level = find(".level").valueAsNumber, width = find(".width").valueAsNumber;  // NaN where nothing stands
    if (scan && Number.isFinite(level) && width > 0) setWindow(level - width / 2, level + width / 2);
    else if (scan) setWindow(low, high);
  });
}
find(".overlay input").addEventListener("input", (event) => { opacity = event.target.value / 100; refresh(); });
new ResizeObserver(refresh).observe(find(".stage"));

// A file dropped on the viewer, or a click on the empty one, goes to Gradio's own field, which checks and uploads it.
const field = () => document.querySelector("#loader input[type=file]");
const stage = find(".stage");
stage.addEventListener("dragover", (event) => { event.preventDefault(); stage.dataset.over = "yes"; });
stage.addEventListener("dragleave", () => { delete stage.dataset.over; });
stage.addEventListener("drop", drop);
document.querySelector("#loader")?.addEventListener("drop", drop, true);  // Gradio's own takes no folders

async function drop(event) {
  event.preventDefault();
  event.stopPropagation();
  delete stage.dataset.over;
  const dropped = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const all = dropped.length ? new DataTransfer() : event.dataTransfer;
  for (const entry of dropped) for (const file of await filesOf(entry)) all.items.add(file);
  if (!field() || !all.files.length) return;
  field().files = all.files;
  field().dispatchEvent(new Event("change", { bubbles: true }));
}

async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
  const reader = entry.createReader(), files = [];
  for (;;) {  // a reader gives a hundred at a time
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) return files;
    for (const one of some) files.push(...await filesOf(one));
  }
}
find(".invite").addEventListener("click", () => field() && field().click());

watch("value", update);
update();
