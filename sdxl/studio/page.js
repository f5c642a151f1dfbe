"use strict";
/* What Gradio does not do by itself. Python names these functions as the js of its events. */
const studio = {
  /** The project in the address; empty for a new one. */
  project: () => new URLSearchParams(location.search).get("project") || "",

  remember: (key) => {
    history.replaceState(null, "", "?project=" + key);
    return [];
  },

  /** The paths of a chosen folder's files in that folder, as JSON: Gradio tells only their names. */
  pathsInFolder: () => {
    const files = document.querySelector("[webkitdirectory]").files;
    return JSON.stringify([...files].map((file) => file.webkitRelativePath.replace(/^[^/]*\//, "")));
  },

  /** Show the editor, and lead the keyboard into it. */
  edit: async () => {
    const editor = await studio.seen("editor");
    editor.tabIndex = -1;
    editor.scrollIntoView({ block: "start" });
    editor.focus({ preventScroll: true });
  },

  /** The element with this id, once it is shown. */
  seen: async (id) => {
    let element;
    while (!(element = document.getElementById(id))?.offsetWidth) await new Promise(requestAnimationFrame);
    return element;
  },

  /** Lead the keyboard back to the picture from which the editor was opened. */
  leave: () => document.getElementById(studio.openedBy)?.focus(),
};

addEventListener("click", ({ target }) => {
  const opener = target.closest(".edit");
  if (opener) studio.openedBy = opener.id;
});

addEventListener("keydown", ({ key, target }) => {
  if (key === "Escape" && target.closest("#editor")) document.getElementById("close-editor").click();
  if (key === "Enter" && target.matches("input[type=number]")) target.blur();
});

/* Gradio tells of a moved slider when a pointer lets it go, but not when a key does. */
addEventListener("keyup", ({ key, target }) => {
  if (target.matches("input[type=range]") && key !== "Tab") target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
});
