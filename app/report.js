// What stands below the report: its sections, the findings that it names, and the files that it can be saved as.
// gr.HTML runs this file once, with `element`, `props` and `watch`; `props.value` is what desk.py's `reading` gives.

const find = (selector) => element.querySelector(selector);

function make(tag, kind, words = "") {
  const node = document.createElement(tag);
  node.className = kind;
  node.textContent = words;
  return node;
}

function complain(words) {
  find(".plea").textContent = words;
  find(".plea").hidden = !words;
}

async function save(url, name) {
  complain("");
  try {
    const answer = await fetch(url, { method: "POST", body: document.querySelector("#report textarea").value });  // what is seen is saved
    if (!answer.ok) return complain(await answer.text());
    const link = make("a", "");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);  // at once would be before a busy browser has it
  } catch (error) {
    complain(`The report could not be saved: ${error.message}.`);
  }
}

function update() {
  const { sections, findings, saves, line, problem } = props.value;
  find(".line").textContent = line;
  complain(problem);
  const rows = [];
  if (sections.length) rows.push(row("Sections", sections.map((words) => make("span", "chip", words))));
  for (const state of ["present", "uncertain", "absent"]) {
    const named = findings.filter((finding) => finding[1] === state);
    if (named.length) rows.push(row(state[0].toUpperCase() + state.slice(1), named.map(([words]) => make("span", `chip ${state}`, words))));
  }
  find(".found").replaceChildren(...rows);
  find(".saves").replaceChildren(...saves.map(([label, url, name]) => {
    const button = make("button", "save", label);
    button.type = "button";
    button.addEventListener("click", () => save(url, name));
    return button;
  }));
}

function row(name, chips) {
  const node = make("div", "row"), group = make("div", "chips");
  group.append(...chips);
  node.append(make("span", "label", name), group);
  return node;
}

watch("value", update);
update();
