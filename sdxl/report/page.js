"use strict";
// The slider over the previews. Without this script the page shows all of them as a grid.
(() => {
  const strip = document.getElementById("strip");
  if (!strip) return;
  const part = (name) => document.getElementById(name);
  const slider = part("moment"), all = part("all"), earlier = part("earlier"), later = part("later");
  const figures = [...strip.querySelectorAll("figure")];
  const last = Number(slider.max);

  function show(place) {
    const at = Math.min(Math.max(place, 0), last);
    for (const figure of figures) {
      figure.classList.toggle("current", Number(figure.dataset.moment) === at);
    }
    const one = figures.find((figure) => Number(figure.dataset.moment) === at);
    const name = one.dataset.name + ("chosen" in one.dataset ? ", chosen" : "");
    slider.value = String(at);
    slider.setAttribute("aria-valuetext", name);
    part("shown").textContent = name;
    earlier.disabled = at === 0;
    later.disabled = at === last;
  }

  function showAll(wanted) {
    strip.classList.toggle("one", !wanted);
    all.setAttribute("aria-pressed", String(wanted));
    for (const control of [slider, earlier, later, part("shown")]) control.hidden = wanted;
  }

  // A link to #step-200 opens the page at that moment.
  function follow() {
    const wanted = /^#step-(\d+)$/.exec(location.hash);
    const one = wanted && figures.find((figure) => figure.dataset.step === wanted[1]);
    if (one) {
      showAll(false);
      show(Number(one.dataset.moment));
      part("previews").scrollIntoView();
    }
  }

  slider.addEventListener("input", () => show(Number(slider.value)));
  earlier.addEventListener("click", () => show(Number(slider.value) - 1));
  later.addEventListener("click", () => show(Number(slider.value) + 1));
  all.addEventListener("click", () => showAll(all.getAttribute("aria-pressed") !== "true"));
  window.addEventListener("hashchange", follow);
  part("controls").hidden = false;
  showAll(false);
  show(Number(strip.dataset.start));
  follow();
})();
