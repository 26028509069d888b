// Workflows of AgentSD's first version end before cache_interval. ComfyUI leaves it at a new node's default there,
// which caches; they stay what they were.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "agentsd.old_workflows",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "AgentSD") return;
    const configure = nodeType.prototype.onConfigure;
    nodeType.prototype.onConfigure = function (info) {
      configure?.apply(this, arguments);
      const place = (this.widgets ?? []).findIndex((widget) => widget.name === "cache_interval");
      const values = info?.widgets_values;
      if (place >= 0 && Array.isArray(values) && values.length <= place) this.widgets[place].value = 1;
    };
  },
});
