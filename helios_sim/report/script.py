"""The page's own script: draws the figures in the theme's colours and the room there is."""

from __future__ import annotations

from typing import Final

COLLECTOR: Final = """
window.pageErrors = [];
function noteError(text) {
  window.pageErrors.push(String(text));
  document.documentElement.dataset.errors = window.pageErrors.join(" | ");
}
window.addEventListener("error", (event) => noteError(event.message));
window.addEventListener("unhandledrejection", (event) => noteError(event.reason));
document.addEventListener("securitypolicyviolation",
  (event) => noteError("blocked " + event.blockedURI + " by " + event.violatedDirective));
"""
"""Collects every error where a reader of the document can see it; comes before all else."""

SCRIPT: Final = """
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const drawn = new Set();
  const config = { responsive: true, displaylogo: false, displayModeBar: false };

  // "@name" is a variable of the style sheet, "@name/0.4" the same at an opacity.
  function colour(text) {
    const [name, alpha] = text.slice(1).split("/");
    const value = getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
    if (alpha === undefined) return value;
    const part = (at) => parseInt(value.slice(at, at + 2), 16);
    return `rgba(${part(1)}, ${part(3)}, ${part(5)}, ${alpha})`;
  }

  function themed(value) {
    if (typeof value === "string") {
      return /^@[a-z]+[0-9]*(\\/[0-9.]+)?$/.test(value) ? colour(value) : value;
    }
    if (Array.isArray(value)) {
      return typeof value[0] === "number" ? value : value.map(themed);
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, themed(one)]));
    }
    return value;
  }

  // Panels beside one another come one below the other, each as high as before. A panel is what
  // an x axis has; panels that share a y axis get one each, and one without a title their row's.
  function stacked(figure) {
    const { data, layout } = structuredClone(figure);
    const named = (ref) => ref[0] + "axis" + ref.slice(1);
    const panels = Object.keys(layout).filter((key) => /^xaxis[0-9]*$/.test(key)).map((key) => {
      const x = "x" + key.slice(5);
      const trace = data.find((one) => (one.xaxis || "x") === x);
      const y = (trace && trace.yaxis) || layout[key].anchor || "y";
      const [low, high] = (layout[named(y)] || {}).domain || [0, 1];
      return { x, y, low, high, left: (layout[key].domain || [0, 1])[0] };
    });
    if (new Set(panels.map((one) => one.left)).size < 2) return figure;
    panels.sort((a, b) => b.high - a.high || a.left - b.left);
    const isOf = (ref, axis) => String(ref).split(" ")[0] === axis;
    const marks = [...(layout.annotations || []), ...(layout.shapes || [])];
    const hasTitles = (layout.annotations || []).some((one) => /domain/.test(one.yref));
    const margin = layout.margin;
    const before = layout.height - margin.t - margin.b;
    const gap = (layout.xaxis.title ? 58 : 36) + (hasTitles ? 22 : 0);
    const heights = panels.map((one) => (one.high - one.low) * before);
    const whole = heights.reduce((sum, one) => sum + one, gap * (panels.length - 1));
    let top = whole, free = 100;
    const taken = new Set();
    panels.forEach((panel, at) => {
      const shared = layout[named(panel.y)];
      const first = layout[named(panels.find((one) => one.high === panel.high).y)];
      const y = taken.has(panel.y) ? "y" + free++ : panel.y;
      taken.add(y);
      const domain = [Math.max(0, top - heights[at]) / whole, top / whole];
      layout[named(y)] = { ...shared, title: shared.title || first.title, anchor: panel.x, domain };
      Object.assign(layout[named(panel.x)], { anchor: y, domain: [0, 1] });
      for (const one of data) if ((one.xaxis || "x") === panel.x) one.yaxis = y;
      for (const one of marks) {
        if (isOf(one.xref, panel.x) && isOf(one.yref, panel.y)) {
          one.yref = one.yref.replace(panel.y, y);
        }
      }
      top -= heights[at] + gap;
    });
    if (layout.legend) layout.legend.y = 1 + (layout.legend.y - 1) * before / whole;
    margin.b = Math.max(margin.b, gap);
    layout.height = whole + margin.t + margin.b;
    return { data, layout };
  }

  // On a narrow page each entry of a long legend has a row of its own: room for these rows, and
  // type in which long names fit.
  function withLegend(figure) {
    const rows = figure.data.filter((one) => one.name && one.showlegend !== false).length;
    if (rows <= 5 || !figure.layout.legend) return figure;
    const { data, layout } = structuredClone(figure);
    layout.height += 20 * rows;
    layout.legend.font.size = 10.5;
    return { data, layout };
  }

  const narrow = matchMedia("(max-width: 700px)");

  function draw(id) {
    const place = document.getElementById(id);
    const { data, layout } = narrow.matches
      ? withLegend(stacked(figures[id])) : figures[id];
    place.style.height = layout.height + "px";
    drawn.add(id);
    return Plotly.react(place, themed(data), themed(layout), config);
  }

  const visible = Object.keys(figures).filter(
    (id) => !document.getElementById(id).closest("[hidden]"));
  Promise.all(visible.map(draw)).then(() => {
    document.documentElement.dataset.ready = String(drawn.size);
  });

  for (const one of [matchMedia("(prefers-color-scheme: dark)"), narrow]) {
    one.addEventListener("change", () => {
      for (const id of drawn) draw(id);
    });
  }

  for (const choice of document.querySelectorAll(".tabs input")) {
    choice.addEventListener("change", () => {
      for (const pane of document.querySelectorAll(`[data-tabs="${choice.name}"]`)) {
        pane.hidden = pane.id !== choice.value;
        if (pane.hidden) continue;
        for (const plot of pane.querySelectorAll(".plot")) {
          if (drawn.has(plot.id)) Plotly.Plots.resize(plot); else draw(plot.id);
        }
      }
    });
  }
})();
"""
