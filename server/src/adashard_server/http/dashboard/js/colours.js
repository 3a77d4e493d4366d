// Colours of the style sheet as a canvas needs them: resolved for the scheme that holds now.

const probe = document.createElement("span");
probe.hidden = true;
document.body.append(probe);
const resolved = new Map();

/** The colour `--name`, with an opacity if one is given. */
export function colour(name, opacity = 1) {
  const key = `${name}/${opacity}`;
  if (!resolved.has(key)) {
    probe.style.color = `var(--${name})`;
    const [red, green, blue] = getComputedStyle(probe).color.match(/[\d.]+/g);
    resolved.set(key, `rgba(${red}, ${green}, ${blue}, ${opacity})`);
  }
  return resolved.get(key);
}

/** Calls back when the scheme changes between light and dark. */
export function onSchemeChange(redraw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    resolved.clear();
    redraw();
  });
}
