// For browsers that don't know modules: they run this script alone.
var problem = document.getElementById("problem");
problem.getElementsByTagName("h2")[0].textContent = "This browser is too old";
problem.getElementsByTagName("p")[0].textContent =
  "The search runs in your browser and needs one from 2023 or later: Chrome, Edge, Firefox or Safari.";
problem.getElementsByTagName("button")[0].style.display = "none";
problem.removeAttribute("hidden");
document.getElementById("loading").style.display = "none";
