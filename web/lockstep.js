// What the page has to know of the pack: the colour of its socket type, and that its files' names may hold %date% and values
// of other nodes, which the page puts in for nodes of its own alone.
import { app } from "../../scripts/app.js";

const TYPE = "LOCKSTEP_MODEL", COLOR = "#e8a33d";
const SAVING = ["LockstepSaveClip", "LockstepSaveAVLatent"];

// The palette loader resets unknown types after setup(), hence the two hooks.
function paint() {
  app.canvas.default_connection_color_byType[TYPE] = COLOR;
  app.canvas.constructor.link_type_colors[TYPE] = COLOR;
  document.body.style.setProperty("--color-datatype-" + TYPE, COLOR); // where nodes are drawn by the page
}

app.registerExtension({
  name: "Lockstep.Page",
  setup() {
    app.ui.settings.addEventListener("Comfy.ColorPalette.change", () => setTimeout(paint));
  },
  afterConfigureGraph: paint,
  nodeCreated(node) {
    const replace = window.comfyAPI?.utils?.applyTextReplacements;
    const prefix = node.widgets?.find(({ name }) => name === "filename_prefix");
    if (replace && prefix && SAVING.includes(node.comfyClass)) prefix.serializeValue = () => replace(app, prefix.value);
  },
});
