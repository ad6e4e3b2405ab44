// Runs before the page is drawn, so that a chosen theme never flashes in the other one. No module: those wait.
(() => {
  const root = document.documentElement;
  const known = ["light", "dark"];
  const read = () => {
    try {
      return localStorage.getItem("promptd-theme");
    } catch {
      return null; // storage may be forbidden; the system's theme is good
    }
  };
  const apply = (theme) => {
    if (known.includes(theme)) root.dataset.theme = theme;
    else delete root.dataset.theme;
  };
  apply(read());
  window.promptdTheme = {
    isDark() {
      return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    },
    toggle() {
      const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
      const next = this.isDark() ? "light" : "dark";
      apply(next === system ? null : next);
      try {
        if (next === system) localStorage.removeItem("promptd-theme");
        else localStorage.setItem("promptd-theme", next);
      } catch {
        // kept for this page only
      }
      root.dispatchEvent(new CustomEvent("themechange"));
    },
  };
})();
