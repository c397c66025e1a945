// Small repairs that need the reader's browser.
"use strict";

// Opened from a file, a page may not fetch another one: search shows its results without an extract of each.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// Wide formulas, tables and listings scroll in their own box: let the keyboard reach the ones that do.
function reachable() {
  const selector = "div.highlight pre, mjx-container[display=true], table.docutils, .output pre";
  for (const box of document.querySelectorAll(selector)) {
    if (box.scrollWidth > box.clientWidth + 1) {
      box.tabIndex = 0;
    } else if (box.tabIndex === 0) {
      box.removeAttribute("tabindex");
    }
  }
}

// Print shows what a screen folds away.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("article details:not([open])")];
  for (const box of folded) box.open = true;
});
addEventListener("afterprint", () => {
  for (const box of folded) box.open = false;
});

addEventListener("load", () => {
  reachable();
  if (window.MathJax && MathJax.startup && MathJax.startup.promise) MathJax.startup.promise.then(reachable);
});
let waiting;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(reachable, 150);
});
