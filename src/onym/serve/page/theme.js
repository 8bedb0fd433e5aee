// The colour scheme: the system's, or the one that was chosen with the button. A classic script in <head>, so that no page flashes in the other scheme.
"use strict";
(() => {
  const schemes = { auto: "light dark", light: "light", dark: "dark" };
  let chosen = "auto";
  try {
    chosen = localStorage.getItem("onym.theme") ?? "auto";
  } catch {} // storage may be forbidden; the system's scheme is then used
  const apply = () => {
    document.documentElement.style.colorScheme = schemes[chosen] ?? schemes.auto;
    const button = document.getElementById("theme");
    if (button) button.textContent = `Theme: ${chosen}`;
    document.dispatchEvent(new Event("themechange"));
  };
  apply();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      const names = Object.keys(schemes);
      chosen = names[(names.indexOf(chosen) + 1) % names.length];
      try {
        localStorage.setItem("onym.theme", chosen);
      } catch {}
      apply();
    });
  });
})();
