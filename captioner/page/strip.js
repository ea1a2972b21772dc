element.querySelector(".strip").append(...props.value.map((example, index) => {
  const button = Object.assign(document.createElement("button"), { type: "button", title: example.name });
  button.append(Object.assign(document.createElement("img"), { src: example.picture, alt: example.name }));
  button.addEventListener("click", () => trigger("click", { index }));
  return button;
}));
