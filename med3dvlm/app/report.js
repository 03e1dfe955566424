// What stands below the report: its sections, the findings that it names, and the files that it can be saved as.
// gr.HTML runs this file once, after common.js, with `element`, `props`, `trigger` and `watch`; `props.value` is what workstation.py's `report_data` gives.

const field = () => document.querySelector("#report textarea");
let typed = false, kept = "", keptPictures = "", shownPictures = 0;  // whether a person wrote there, and what was saved last

const pictured = () => props.value.pictures.map(([, url]) => url).join();
const words = () => field()?.value.trim() ?? "";  // of a page that was loaded again, the server knows whether they are a person's
workstation.unsaved = () => (words() !== "" && field().value !== kept && (typed || props.value.unsaved)) || (pictured() !== "" && pictured() !== keptPictures);
document.addEventListener("input", (event) => { if (event.target === field()) typed = true; });

// Another scan has another report: what would be lost is asked about before anything is opened.
workstation.mayOpen = () => !workstation.unsaved() || confirm("The report was changed and not saved. Opening another scan discards it. Open the other scan?");
for (const kind of ["click", "change"]) {
  document.addEventListener(kind, (event) => {
    const opens = event.target.closest?.(kind === "click" ? "#examples button" : "#loader input[type=file]");
    if (!opens || workstation.mayOpen()) return;
    event.stopImmediatePropagation();
    event.preventDefault();
    if (kind === "change") opens.value = "";
  }, true);
}
document.addEventListener("click", (event) => {
  if (event.target.closest?.("#draft")) lock(true);  // until the server says how it went
}, true);

function lock(locked) {
  const text = field();
  if (!text) return;
  text.readOnly = locked;
  text.title = locked ? "The model is writing here; wait for it or stop it" : "";
}

function complain(words) {
  find(".problem").textContent = words;
  find(".problem").hidden = !words;
}

async function save(url, name) {
  complain("");
  const words = field().value;  // what is seen is saved
  try {
    const answer = await fetch(url, { method: "POST", body: words });
    if (answer.status === 404) return rescue(words, "The server no longer has this scan");
    if (!answer.ok) return complain(await answer.text());
    download(await answer.blob(), name);
    [kept, typed, keptPictures] = [words, false, pictured()];
  } catch (error) {
    if (error instanceof TypeError) return rescue(words, "The connection to the server is lost");
    complain(`The report could not be saved: ${error.message}.`);
  }
}

function rescue(words, why) {
  download(new Blob([words], { type: "text/plain" }), "report.txt");
  [kept, typed] = [words, false];
  complain(`${why}. The words of the report were saved as report.txt, without notes on the model and the scan.`);
}

function update() {
  const { sections, findings, saves, line, problem, pictures, open } = props.value, drafting = Boolean(open && !workstation.lost);
  if (drafting) typed = false;
  lock(drafting);
  tell({ drafting });
  if (pictures.length > shownPictures) workstation.added(pictures.at(-1)[0]);
  shownPictures = pictures.length;
  find(".line").textContent = line;
  complain(problem);
  const rows = [];
  if (sections.length) rows.push(row("Sections", sections.map((words) => make("span", "chip", words))));
  for (const state of ["present", "uncertain", "absent"]) {
    const named = findings.filter((finding) => finding[1] === state);
    if (named.length) rows.push(row(state[0].toUpperCase() + state.slice(1), named.map(([words]) => finding(words, state))));
  }
  find(".found").replaceChildren(...rows);
  find(".pictures").replaceChildren(...pictures.map(([label, url, number]) => {
    const figure = make("figure", ""), remove = button("×", "remove", () => trigger("select", { value: number }), "Remove this image from the report");
    remove.setAttribute("aria-label", `Remove ${label}`);
    figure.append(make("img", "", "", { src: url, alt: label }), make("figcaption", "", label), remove);
    return figure;
  }));
  find(".saves").replaceChildren(...saves.map(([label, url, name]) => button(label, "save", () => save(url, name))));
}

// With a segmenter, a finding that the report does not deny can be shown on the scan.
function finding(words, state) {
  if (!props.value.segmenter || state === "absent") return make("span", `chip ${state}`, words);
  return button(words, `chip ${state}`, () => workstation.locate(words), "Show it on the scan");
}

function row(name, chips) {
  const node = make("div", "row"), group = make("div", "chips");
  group.append(...chips);
  node.append(make("span", "label", name), group);
  return node;
}

workstation.parts.push(update);
watch("value", update);
update();
