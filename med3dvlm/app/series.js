// The series of the study that is open, or was sent and needs a choice. Runs before viewer.js, in its scope.

const seriesOf = find(".study select");
let listedOf = "";

function listSeries(series, of) {
  find(".study").hidden = series.length < 2;
  if (listedOf === (of += JSON.stringify(series))) return;
  listedOf = of;
  const none = series.some(([, , open]) => open) ? [] : [new Option("choose the one to open", "", true, true)];
  seriesOf.replaceChildren(...none, ...series.map(([number, words, open]) => new Option(`${number}: ${words}`, number, open, open)));
}

seriesOf.addEventListener("change", () => {
  const chosen = Number(seriesOf.value), [shown] = props.value.series.find(([, , open]) => open) || [""];
  if (chosen !== shown && workstation.mayOpen()) trigger("option_select", { value: chosen });
  seriesOf.value = shown;  // until the other one is open
});
