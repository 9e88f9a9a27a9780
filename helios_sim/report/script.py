"""The page's own script: draws the figures in the theme's colours and redraws on a change."""

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

  function draw(id) {
    const place = document.getElementById(id);
    const { data, layout } = figures[id];
    drawn.add(id);
    return Plotly.react(place, themed(data), themed(layout), config);
  }

  const visible = Object.keys(figures).filter(
    (id) => !document.getElementById(id).closest("[hidden]"));
  Promise.all(visible.map(draw)).then(() => {
    document.documentElement.dataset.ready = String(drawn.size);
  });

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const id of drawn) draw(id);
  });

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
