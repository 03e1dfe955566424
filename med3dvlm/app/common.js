// What the parts of the page share. Runs before each of them, in its scope, where gr.HTML gives `element`.

const find = (selector) => element.querySelector(selector);

function make(tag, kind, words = "", more = {}) {
  const node = document.createElement(tag);
  node.className = kind;
  node.textContent = words;
  return Object.assign(node, more);
}

function download(blob, name) {
  const link = make("a", "", "", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);  // at once would be before a busy browser has it
}

function button(words, kind, act, title = "") {
  const node = make("button", kind, words, { type: "button", title });
  node.addEventListener("click", act);
  return node;
}

// What one part has to know of the others, once for the whole page. Each part sets what it knows and calls `tell`.
const workstation = (window.med3dvlm ??= {
  scan: false, segmenter: false, turns: 0, answering: false, drafting: false, lost: "", parts: [],  // `parts`: what to call when the connection is lost or back
  unsaved: () => false, mayOpen: () => true, added: () => {},  // of the report: its words are unsaved, a scan may replace it, an image came to it
  locate: () => {},  // shows a finding on the scan, by name
});

function tell(known = {}) {
  Object.assign(workstation, known);
  enable();
}

const PHRASE = ["Type a finding first", "Type a finding, or draft the report first"];

// Controls that can do nothing are disabled and say why.
function enable() {
  const written = (selector) => Boolean(document.querySelector(selector)?.value.trim());
  const needs = {
    "#question button": [workstation.answering && "An answer is being written", !workstation.scan && "Open a scan first", !written("#question textarea") && "Type a question first"],
    "#clear": [!workstation.turns && "There is no conversation yet"],
    "#draft": [workstation.drafting && "The report is being drafted", !workstation.scan && "Open a scan first"],
    "#end-draft": [!workstation.drafting && "No draft is being written"],
    "#phrase button": [!workstation.scan && "Open a scan first", !written("#phrase textarea, #phrase input") && !(workstation.segmenter && written("#report textarea")) && PHRASE[workstation.segmenter ? 1 : 0]],
    "#search": [!workstation.scan && "Open a scan first"],
  };
  for (const [selector, reasons] of Object.entries(needs)) {
    const node = document.querySelector(selector), reason = workstation.lost || reasons.find(Boolean) || "";
    if (node) [node.disabled, node.title] = [Boolean(reason), reason];
  }
}

if (!workstation.watching) {
  workstation.watching = true;
  let planned = false;
  const soon = () => {
    if (planned) return;
    planned = true;
    requestAnimationFrame(() => { planned = false; enable(); });
  };
  new MutationObserver(soon).observe(document.body, { childList: true, subtree: true });  // a tab is made when it is first shown
  document.addEventListener("input", soon);
  watchConnection();
}

// Asks the server every few seconds whether it is there. A busy one may be slow: silence counts when it is long.
function watchConnection() {
  let first = null;
  async function look() {
    let lost = "";
    try {
      const answer = await fetch("gradio_api/app_id", { cache: "no-store", signal: AbortSignal.timeout(20_000) });
      const now = answer.ok ? (await answer.json()).app_id : null;
      first ??= now;
      if (now !== first) lost = "The server was started again and no longer has this scan. Save the report if you need it, then reload the page.";
    } catch {
      lost = "The connection to the server is lost. What is on the page stays; save the report if you need it, and start the server again.";
    }
    if (lost !== workstation.lost) {
      tell({ lost });
      document.querySelector(".lost")?.remove();
      if (lost) document.body.append(make("div", "lost bar error", lost, { role: "alert" }));
      for (const part of workstation.parts) part();
    }
    setTimeout(look, 3000);
  }
  look();
}
