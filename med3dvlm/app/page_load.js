// Runs when the page was loaded, and gives the server the token of the session that this tab had before.
//
// The tab keeps the token only from the moment it is left until it is there again, so that a copy of the tab gets a session of its own.
() => {
  const kept = sessionStorage.getItem("med3dvlm") || "";
  const forget = () => sessionStorage.removeItem("med3dvlm");
  forget();
  window.addEventListener("pageshow", forget);
  window.addEventListener("pagehide", () => {
    const token = document.querySelector("#ticket textarea, #ticket input")?.value;
    if (token) sessionStorage.setItem("med3dvlm", token);
  });
  return kept;
}
