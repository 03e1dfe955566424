// Asks before the page is left with an unsaved report. It runs before Gradio's own listener, which would end the session even of who then stays.
window.addEventListener("beforeunload", (event) => {
  if (!window.med3dvlm?.unsaved()) return;
  event.preventDefault();
  event.returnValue = "";  // the browser asks in its own words
  event.stopImmediatePropagation();
});
