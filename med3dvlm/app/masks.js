// Contours of findings in the three planes, and the list of them below the viewer. Runs after voxels.js and pane.js, and before viewer.js, in its scope.
//
// A mask has the facts of masks.py's `for_viewer`, `bits` (the voxels of its box along z, y, x, eight a byte, the lowest bit first) and `visible`.

const MASK_COLOURS = ["#ff5d73", "#3fe0e0", "#d08bff", "#ff9f43", "#b6e34b", "#ff8ad8", "#a8b8ff", "#f2e6c9"];
let masks = [], wentTo = null;  // the last target, as [scan, number]

const colourOf = (mask) => MASK_COLOURS[(mask.number - 1) % MASK_COLOURS.length];

// Takes the list as the server has it; fetches what is new, and goes to its target once.
async function setMasks({ masks: listed, target, segmenter, saves }) {
  const of = scan, known = new Map(masks.map((mask) => [mask.number, mask])), before = masks.map((mask) => mask.number).join();
  tell({ segmenter, locate });
  try {
    const all = await Promise.all(listed.map(async (facts) => {
      const size = Math.ceil(facts.shape.reduce((product, length) => product * length, 1) / 8);
      const fetched = known.get(facts.number) || { visible: true, drawn: {}, bits: facts.found ? new Uint8Array(await fetchBytes(facts.url, size, () => {})) : null };
      return Object.assign(fetched, facts);
    }));
    if (scan !== of) return;  // another scan was opened meanwhile
    masks = all;
  } catch (error) {
    if (scan === of) say(`The masks could not be loaded: ${error.message}.`, "error");
    return;
  }
  if (before !== masks.map((mask) => mask.number).join()) listMasks(saves);
  const goal = target === null ? "" : `${scan.url} ${target}`, mask = masks.find((each) => each.number === target);
  if (mask && goal !== wentTo) goTo(mask);
  wentTo = goal;
  refresh();
}

function clearMasks() {
  [masks, wentTo] = [[], null];
  listMasks([]);
}

// The planes go to the middle of the finding, whose contour is then on.
function goTo(mask) {
  pause();
  mask.visible = true;
  at = [...mask.target];
  listed(mask).querySelector("input").checked = true;
  find(".findings .spoken").textContent = `The planes show ${mask.name}: ${Object.values(panes).map((pane) => `${scan.names[pane.name]} ${at[pane.cut] + 1}`).join(", ")}.`;
  element.scrollIntoView({ block: "nearest" });
  refresh();
}

const listed = (mask) => find(`.findings li[data-number="${mask.number}"]`);

// A finding that was clicked in the report or in an answer: go there, or let the model look for it first.
function locate(name) {
  const mask = masks.find((each) => each.name.toLowerCase() === name.toLowerCase());
  if (mask && mask.found) goTo(mask);
  else if (mask) listed(mask).scrollIntoView({ block: "nearest" });
  else trigger("submit", { value: name });
}

function showAll() {
  const visible = !masks.some((mask) => mask.found && mask.visible);
  for (const mask of masks.filter((each) => each.found)) {
    mask.visible = visible;
    listed(mask).querySelector("input").checked = visible;
  }
  refresh();
}

function nextMask() {
  const found = masks.filter((mask) => mask.found), last = found.findIndex((mask) => mask.target.join() === at.join());
  if (found.length) goTo(found[(last + 1) % found.length]);
}

function listMasks(saves) {
  find(".findings").hidden = !masks.length;
  find(".findings .spoken").textContent = "";
  find(".findings ul").replaceChildren(...masks.map((mask) => {
    const item = make("li", ""), title = `${mask.number}: ${mask.name}`, percent = `${Math.round(100 * mask.score)} %`;
    item.dataset.number = mask.number;
    if (mask.found) {
      const box = make("input", "", "", { type: "checkbox", checked: mask.visible, title: "Contour on or off (key V: all)" });
      box.setAttribute("aria-label", `Contour of ${mask.name}`);
      box.style.accentColor = colourOf(mask);
      box.addEventListener("change", () => { mask.visible = box.checked; refresh(); });
      const swatch = make("span", "swatch");
      swatch.style.background = colourOf(mask);
      const words = mask.measurements ? `${title}, ${mask.measurements}` : title;
      item.append(box, swatch, button(words, "go", () => goTo(mask), `The planes go there (key N: the next). Probability of being present: ${percent}`));
    } else {
      item.append(make("span", "missing", `${title}, not drawn (probability of being present: ${percent})`));
    }
    const remove = button("×", "remove", () => trigger("delete", { value: mask.number }), "Remove this finding from the list");
    remove.setAttribute("aria-label", `Remove ${mask.name}`);
    item.append(remove);
    return item;
  }));
  const found = masks.some((mask) => mask.found);
  find(".findings .saves").hidden = !found;
  find(".findings .saves").replaceChildren(...saves.map(([label, url, name]) => button(`Save masks: ${label}`, "save", () => saveMasks(url, name))));
}

async function saveMasks(url, name) {
  try {
    const answer = await fetch(url);
    if (!answer.ok) return say(await answer.text(), "error");
    download(await answer.blob(), name);
    say("");
  } catch (error) {
    say(`The masks could not be saved: ${error.message}.`, "error");
  }
}

// Of the slice or slab that a plane shows: the outline along the voxels' edges as a path in voxels, with its right and upper end; null where none is.
function contour(mask, pane) {
  const [first, last] = slabOf(pane.cut, at[pane.cut]), key = `${first} ${last}`;
  if (mask.drawn[pane.name]?.key !== key) mask.drawn[pane.name] = { key, outline: outline(mask, pane, first, last) };
  return mask.drawn[pane.name].outline;
}

function outline(mask, { cut, rows, columns }, first, last) {
  const [from, to] = [Math.max(first, mask.origin[cut]), Math.min(last + 1, mask.origin[cut] + mask.shape[cut])];
  if (from >= to) return null;
  const [height, width] = [mask.shape[rows], mask.shape[columns]], strides = [mask.shape[1] * mask.shape[2], mask.shape[2], 1];
  const inside = new Uint8Array((height + 2) * (width + 2)), row = width + 2;  // with a margin of one voxel
  for (let slice = from - mask.origin[cut]; slice < to - mask.origin[cut]; slice++) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const place = slice * strides[cut] + y * strides[rows] + x * strides[columns];
        inside[(y + 1) * row + x + 1] |= (mask.bits[place >> 3] >> (place & 7)) & 1;
      }
    }
  }
  const path = new Path2D(), [left, top] = [mask.origin[columns] - 1, mask.origin[rows] - 1];
  let corner = null;
  const line = (x, y, u, v) => { path.moveTo(left + x, top + y); path.lineTo(left + u, top + v); };
  for (let y = 1; y < height + 2; y++) {
    for (let x = 1; x < width + 2; x++) {
      const place = y * row + x;
      if (inside[place] && (!corner || left + x + 1 > corner[0])) corner = [left + x + 1, top + y];
      if (inside[place] !== inside[place - row]) line(x, y, x + 1, y);
      if (inside[place] !== inside[place - 1]) line(x, y, x, y + 1);
    }
  }
  return corner && { path, corner };
}

function drawContours(context, pane, density) {
  const { left, top, across, down } = pane.place();
  for (const mask of masks) {
    const drawn = mask.found && mask.visible ? contour(mask, pane) : null;
    if (!drawn) continue;
    const path = new Path2D();
    path.addPath(drawn.path, new DOMMatrix([across, 0, 0, down, left, top]));
    context.lineCap = "square";
    for (const [colour, width] of [["#000a", 3.5], [colourOf(mask), 1.75]]) {
      [context.strokeStyle, context.lineWidth] = [colour, width * density];
      context.stroke(path);
    }
    context.font = `${12 * density}px ui-monospace, monospace`;
    [context.textAlign, context.fillStyle, context.strokeStyle, context.lineWidth] = ["left", colourOf(mask), "#000", 3 * density];
    const place = pane.onCanvas(drawn.corner).map((value, axis) => value + [4, -2][axis] * density);
    context.strokeText(mask.number, ...place);
    context.fillText(mask.number, ...place);
    context.lineCap = "butt";
  }
}
