class HTTP:
    name = "http"
