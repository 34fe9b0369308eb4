"use strict";
const tip = document.getElementById("tip");
const value = ([from, to, low, high, log], at) => {
  const part = (at - from) / (to - from);
  return log ? low * Math.pow(high / low, part) : low + part * (high - low);
};
const written = (number, unit) => {
  if (unit === "share") return (100 * number).toFixed(1) + " %";
  if (unit === "seconds") return number >= 1 ? number.toPrecision(4) + " s" : (1000 * number).toPrecision(3) + " ms";
  return number >= 100 ? number.toFixed(0) : number.toPrecision(3);
};
for (const svg of document.querySelectorAll("svg[data-plot]")) {
  const scales = JSON.parse(svg.dataset.plot);
  const lines = Array.from(svg.querySelectorAll("polyline"), (line) => ({
    label: line.dataset.label,
    points: line.getAttribute("points").split(" ").map((point) => point.split(",").map(Number)),
  }));
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
  svg.addEventListener("pointermove", (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const nearest = new Map();
    for (const { label, points } of lines) {
      for (const point of points) {
        const away = Math.abs(point[0] - place.x);
        const known = nearest.get(label);
        if (known === undefined || known.away > away) nearest.set(label, { away, point });
      }
    }
    const near = Array.from(nearest).filter(([, found]) => 12 > found.away);
    tip.hidden = near.length === 0;
    if (tip.hidden) return;
    const head = written(value(scales.x, place.x), scales.units[0]);
    const rows = near.map(([label, found]) => label + ": " + written(value(scales.y, found.point[1]), scales.units[1]));
    tip.textContent = [head, ...rows].join("\n");
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
}
