// Colours the one socket type of the pack. The palette loader resets unknown types after setup(), hence the two hooks.
import { app } from "../../scripts/app.js";

const COLOR = "#e8a33d";

function paint() {
  app.canvas.default_connection_color_byType["LOCKSTEP_MODEL"] = COLOR;
  app.canvas.constructor.link_type_colors["LOCKSTEP_MODEL"] = COLOR;
}

app.registerExtension({
  name: "Lockstep.SocketColor",
  setup() {
    app.ui.settings.addEventListener("Comfy.ColorPalette.change", () => setTimeout(paint));
  },
  afterConfigureGraph: paint,
});
