"""The report page's style sheet and its one script: no outside resources."""

CSS = """
:root{color-scheme:light dark;--bg:#fff;--panel:#f6f7f9;--text:#1c2128;--quiet:#59636e;--rule:#d8dee4;--good:#116329;
--bad:#a40e26;--neg:#ffb067;--pos:#8fbcff;--teacher:#0b7a75;--raw:.28;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b0568f;--c4:#56b4e9;--c5:#e69f00;--c6:#8c959f}
@media(prefers-color-scheme:dark){:root{--bg:#0f1419;--panel:#171d24;--text:#e6e9ed;--quiet:#9aa5b1;--rule:#2d3640;
--good:#6fcf8b;--bad:#ff9492;--neg:#a85400;--pos:#2f62b3;--teacher:#4fd0c7;--raw:.35;
--c0:#4aa8e0;--c1:#f28a3c;--c2:#2fc79a;--c3:#dd92bf;--c4:#8accf2;--c5:#f2bb4a;--c6:#8b949e}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:clamp(1.5rem,4vw,2.1rem);line-height:1.2;margin:0 0 .4rem;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:2.75rem 0 .75rem;padding-top:1.25rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:0}
p{margin:.5rem 0}
.lead{font-size:1.1rem;max-width:46rem;margin:.25rem 0 1.25rem}
.quiet,.note{color:var(--quiet);font-size:.9rem}
.wrap{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.45rem clamp(.6rem,2vw,1.4rem) .45rem 0;border-bottom:1px solid var(--rule);text-align:right;
white-space:nowrap;vertical-align:baseline}
th:first-child,td:first-child{text-align:left;white-space:normal}
th:last-child,td:last-child{padding-right:0}
th{font-weight:600;color:var(--quiet);font-size:.85rem}
td small{display:block;color:var(--quiet)}
.good small,.bad small{color:inherit}
td.after{font-weight:650}
.good{color:var(--good)}.bad{color:var(--bad)}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
figure{margin:0;padding:.9rem 1rem .6rem;background:var(--panel);border-radius:10px;display:flex;flex-direction:column}
figcaption{flex:1}
figcaption p,figure.empty>p{margin:.1rem 0 .5rem;color:var(--quiet);font-size:.85rem;line-height:1.4}
figure.empty>p{font-style:italic}
figure.empty figcaption{flex:0}
.legend{list-style:none;margin:0 0 .4rem;padding:0;display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.82rem}
.legend i{display:inline-block;width:.75rem;height:.75rem;border-radius:3px;margin-right:.35rem;vertical-align:-.06rem}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:11px;fill:var(--quiet);font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .raw{fill:none;stroke-width:1;opacity:var(--raw)}
svg .band{stroke:var(--panel);stroke-width:.6}
.answers{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));margin:.5rem 0 1rem}
.answers>div{background:var(--panel);border-radius:10px;padding:.7rem 1rem}
.answers h3{font-size:.85rem;color:var(--quiet)}
.answers p,.prompt,.tokens{white-space:pre-wrap;overflow-wrap:anywhere}
.prompt{color:var(--quiet);font-size:.92rem}
.tokens{line-height:2.05;font-size:1rem}
details{border-bottom:1px solid var(--rule);padding:.55rem 0}
summary{cursor:pointer;font-weight:600}
summary span{font-weight:400;color:var(--quiet);font-size:.9rem;margin-left:.4rem}
pre{overflow-x:auto;background:var(--panel);border-radius:10px;padding:1rem;font-size:.82rem;line-height:1.45}
.scale{font-size:.9rem}
.scale .t{white-space:nowrap;margin:0 .12rem;padding:.1rem .35rem}
.scale p>span:not(.t){color:var(--quiet)}
.t{padding:.16rem 0;border-radius:3px;border-bottom:2px solid transparent}
.neg{background:color-mix(in srgb,var(--neg) calc(var(--a)*100%),transparent)}
.pos{background:color-mix(in srgb,var(--pos) calc(var(--a)*100%),transparent)}
.out{border-bottom:2px solid var(--text)}
.soft{border-bottom:2px dotted var(--text)}
.guided{color:var(--teacher);font-style:italic;border-bottom:2px dashed var(--teacher)}
.tokens .t:hover,.picked{outline:2px solid var(--text);outline-offset:0}
.tokens .t{cursor:default}
.values{position:sticky;bottom:0;background:var(--bg);margin:0;padding:.3rem 0;white-space:pre-wrap}
"""

# A tap or click on a token shows its values under the rollout, for screens without a pointer.
SCRIPT = """
let picked=null;
document.addEventListener("click",e=>{const t=e.target.closest(".tokens .t");if(!t)return;
if(picked)picked.classList.remove("picked");picked=t;t.classList.add("picked");
const box=t.closest("details");let s=box.querySelector(".values");
if(!s){s=document.createElement("p");s.className="values";s.setAttribute("role","status");box.append(s)}
s.textContent=t.title});
"""
